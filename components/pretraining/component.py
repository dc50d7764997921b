"""The pre-training stage as a KFP component."""

from kfp import dsl

from components.runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretraining(
    config: str,
    code: str,
    seed: int,
    base_checkpoint: str,
    tasks: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Dense base (or `base_checkpoint`, a pointer's JSON), indexer warm-up, sparse training. `code` as in synthesis."""
    from components.runtime.stage import run_component

    run_component(
        "pretraining",
        config,
        seed,
        inputs={"tasks": tasks, "base": base_checkpoint},
        outputs={"checkpoint": checkpoint},
        summary=summary,
        code=code,
    )
