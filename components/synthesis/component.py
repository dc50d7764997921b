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
    split_seed: int = -1,
) -> None:
    """Environments -> tasks, demonstrations and documents. `code`: digest of the sources, part of the cache key.

    `split_seed`: of an earlier task set whose held-out templates stay held out; below 0: that of the configuration.
    """
    import json

    from components.runtime.stage import run_component

    if split_seed >= 0:
        config = json.dumps({**json.loads(config), "split_seed": int(split_seed)})
    run_component("synthesis", config, seed, inputs={}, outputs={"tasks": tasks}, summary=summary)
