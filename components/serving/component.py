"""The serving check as a KFP component."""

from kfp import dsl

from components.runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def serving(
    config: str,
    code: str,
    seed: int,
    tasks: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Input[dsl.Model],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Serves the champion over HTTP and plays held-out tasks through the official client. `code` as in synthesis."""
    from components.runtime.stage import run_component

    run_component(
        "serving",
        config,
        seed,
        inputs={"tasks": tasks, "checkpoint": checkpoint},
        outputs={},
        summary=summary,
        run="components.serving.check:run",
        config_class="components.serving.config:ServingConfig",
    )
