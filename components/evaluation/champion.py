"""The candidate against the champion: plays the champion on the tasks and seeds that the candidate was played on.

    python -m components.evaluation champion --config champion.yaml

A stage of its own, so that a change of champion plays one model and leaves the evaluation in the cache.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from components.evaluation.config import ChampionConfig
from components.evaluation.report import ITEMS_FILE, EvaluationReport
from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_tasks

if TYPE_CHECKING:
    from components.evaluation.play import Item, Player
    from components.rollouts import EpisodeResult


def run(config: ChampionConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `champion`. inputs: tasks, evaluation, and champion where there is one; outputs: evaluation.

    Without a champion, or when the candidate is it, the evaluation is handed through as it is. Raises InputError when
    the evaluation was made from another task set, or the champion cannot play these tasks.
    """
    directory = context.fetch(inputs["evaluation"])
    report = EvaluationReport.read(directory)
    champion = inputs.get("champion")
    if champion is None or champion.sha256 == report.candidate.sha256:
        return StageResult({"evaluation": inputs["evaluation"]}, {"compared": False})
    if report.tasks.sha256 != inputs["tasks"].sha256:
        raise InputError(f"the evaluation {inputs['evaluation'].uri} was made from another task set; evaluate again")

    # Imported here: a run without another champion needs no model, and does not wait for torch.
    import torch

    from components.evaluation.compare import Bootstrap
    from components.evaluation.measures import SAMPLED, champion_of, select
    from components.evaluation.play import Player, read_items, write_items

    if config.threads:
        torch.set_num_threads(config.threads)
    items = read_items(directory / ITEMS_FILE)
    candidate = select(items, "after", "sampled", SAMPLED)
    player = Player.load("champion", context.fetch(champion), champion.sha256)
    played = _play(player, candidate, config, context, inputs["tasks"], report.seed)
    bootstrap = Bootstrap(report.resamples, report.confidence, report.seed)
    found = champion_of([*items, *played], champion, bootstrap, report.separate)
    target = context.work_dir / "evaluation"
    shutil.copytree(directory, target, dirs_exist_ok=True)
    report.model_copy(update={"champion": found}).write(target)
    write_items([*items, *played], target / ITEMS_FILE)
    pointer = context.publish("evaluation", target, parents=[inputs["evaluation"], champion])
    summary = {"compared": True, "champion": found.rate.model_dump(), "difference": found.difference.model_dump()}
    return StageResult({"evaluation": pointer}, summary)


def _play(
    player: Player,
    candidate: list[Item],
    config: ChampionConfig,
    context: StageContext,
    tasks: Pointer,
    seed: int,
) -> list[Item]:
    """The candidate's sampled tasks, in their order, with their seeds, as the champion plays them."""
    from components.evaluation.measures import SAMPLED
    from components.evaluation.play import play

    by_id = {task.id: task for task in read_tasks(context.fetch(tasks), "test")}
    wanted = [by_id[item.task] for item in candidate]
    words = {word for task in wanted for message in task.messages for word in message.content.split()}
    unknown = sorted(word for word in words if player.tokenizer.token_to_id(word) is None)
    if unknown:
        raise InputError(
            f"the champion does not know the words {', '.join(unknown[:5])} of these tasks: it was trained on other "
            "environments; take the alias away (or promote by hand) to start a new line of models"
        )
    done = 0

    def show(result: EpisodeResult) -> None:
        nonlocal done
        done += 1
        context.progress.update(done, len(wanted))

    items, _ = play(
        player,
        wanted,
        measure="sampled",
        temperature=SAMPLED,
        seed=seed,
        task_set=tasks.sha256,
        code=context.code,
        max_sequences=config.max_sequences,
        on_episode=show,
    )
    return items
