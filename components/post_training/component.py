"""The post-training stage as a KFP component."""

from kfp import dsl

from components.runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def post_training(
    config: str,
    code: str,
    seed: int,
    tasks: dsl.Input[dsl.Dataset],
    pretrained: dsl.Input[dsl.Model],
    checkpoint: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Reinforcement learning in the environments of the task set. `code` as in synthesis."""
    from components.runtime.stage import run_component

    run_component(
        "post_training",
        config,
        seed,
        inputs={"tasks": tasks, "checkpoint": pretrained},
        outputs={"checkpoint": checkpoint},
        summary=summary,
    )
