"""The synthesis stage as a KFP component."""

from kfp import dsl

from components.runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def synthesis(
    config: str,
    code: str,
    seed: int,
    tasks: dsl.Output[dsl.Dataset],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Environments -> tasks, demonstrations and documents. `code`: digest of the sources, part of the cache key."""
    from components.runtime.stage import run_component

    run_component("synthesis", config, seed, inputs={}, outputs={"tasks": tasks}, summary=summary)
