"""The evaluation room as KFP components. `code` is the digest of a stage's sources: part of its cache key."""

from kfp import dsl

from components.runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluation(
    config: str,
    code: str,
    seed: int,
    tasks: dsl.Input[dsl.Dataset],
    before: dsl.Input[dsl.Model],
    after: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Plays the held-out tasks with both models and measures the sparse attention."""
    from components.runtime.stage import run_component

    run_component(
        "evaluation",
        config,
        seed,
        inputs={"tasks": tasks, "before": before, "after": after},
        outputs={"evaluation": evaluation},
        summary=summary,
    )


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def champion(
    config: str,
    code: str,
    seed: int,
    champion: str,
    champion_version: str,
    tasks: dsl.Input[dsl.Dataset],
    evaluated: dsl.Input[dsl.Artifact],
    evaluation: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Adds the comparison with the champion (a pointer's JSON, or empty) to the evaluation."""
    from components.runtime.stage import run_component

    run_component(
        "champion",
        config,
        seed,
        inputs={"tasks": tasks, "evaluation": evaluated, "champion": champion},
        outputs={"evaluation": evaluation},
        summary=summary,
        run="components.evaluation.champion:run",
        config_class="components.evaluation.config:ChampionConfig",
    )


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    config: str,
    code: str,
    seed: int,
    champion: str,
    champion_version: str,
    evaluation: dsl.Input[dsl.Artifact],
    decision: dsl.OutputPath(str),  # type: ignore[valid-type]
    verdict: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Decides. `decision` is promoted, rejected or unchanged; `verdict` points to the rules with their numbers."""
    from pathlib import Path

    from components.runtime.stage import run_component

    result = run_component(
        "gate",
        config,
        seed,
        inputs={"evaluation": evaluation, "champion": champion},
        outputs={"verdict": verdict},
        summary=summary,
        run="components.evaluation.gate:run",
        config_class="components.evaluation.gate:GateConfig",
    )
    Path(decision).parent.mkdir(parents=True, exist_ok=True)
    Path(decision).write_text(result.summary["verdict"])


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promotion(
    config: str,
    code: str,
    seed: int,
    verdict: dsl.Input[dsl.Artifact],
    champion: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Moves the registry's aliases."""
    from components.runtime.stage import run_component

    run_component(
        "promotion",
        config,
        seed,
        inputs={"verdict": verdict},
        outputs={"champion": champion},
        summary=summary,
        run="components.evaluation.promotion:run",
        config_class="components.evaluation.promotion:PromotionConfig",
    )


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def rejected(
    config: str,
    code: str,
    seed: int,
    verdict: dsl.Input[dsl.Artifact],
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Fails by name, with the rules that did not hold."""
    from components.runtime.stage import run_component

    run_component(
        "rejected",
        config,
        seed,
        inputs={"verdict": verdict},
        outputs={},
        summary=summary,
        run="components.evaluation.rejected:run",
        config_class="components.evaluation.rejected:RejectedConfig",
    )


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def origin(
    config: str,
    code: str,
    occasion: str,
    model: str,
    checkpoint: dsl.Output[dsl.Model],
    trained_from: dsl.Output[dsl.Model],
    champion: dsl.OutputPath(str),  # type: ignore[valid-type]
    champion_version: dsl.OutputPath(str),  # type: ignore[valid-type]
    fresh_seed: dsl.OutputPath(int),  # type: ignore[valid-type]
    split_seed: dsl.OutputPath(int),  # type: ignore[valid-type]
    summary: dsl.Output[dsl.Metrics],
) -> None:
    """Which checkpoint a run starts from (`model`: a pointer's JSON, or empty: the champion), and its fresh seed.

    `occasion`: what the seed follows from; empty: the run's id.
    """
    import json
    from pathlib import Path

    from components.runtime.stage import run_component

    result = run_component(
        "origin",
        json.dumps({**json.loads(config), "occasion": occasion}),
        0,
        inputs={"checkpoint": model},
        outputs={"checkpoint": checkpoint, "trained_from": trained_from},
        summary=summary,
        run="components.evaluation.origin:run",
        config_class="components.evaluation.origin:OriginConfig",
    )
    pointer = result.summary["champion"]
    for value, path in (
        (json.dumps(pointer) if pointer else "", champion),
        (result.summary["champion_version"], champion_version),
        (result.summary["fresh_seed"], fresh_seed),
        (result.summary["split_seed"], split_seed),
    ):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(str(value))
