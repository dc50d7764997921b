"""A task set of a few knowledge-graph tasks, with the demonstrations and documents that a training needs."""

import random

from components.environments.kg_query import KnowledgeGraphQuery
from components.runtime.contracts import Pointer
from components.runtime.stage import StageContext
from components.runtime.task_set import write_task_set

FAMILY = KnowledgeGraphQuery()


def publish_knowledge_tasks(context: StageContext) -> Pointer:
    templates = FAMILY.templates()[::50]
    tasks = [FAMILY.generate(t, s, split) for split in ("train", "validation") for s, t in enumerate(templates)]
    write_task_set(
        context.work_dir / "tasks",
        tasks=tasks,
        long_tasks=[],
        demonstrations=[FAMILY.play(task, "careful", random.Random(task.seed)) for task in tasks],
        documents=[FAMILY.document(seed, split, 60) for split in ("train", "validation") for seed in range(3)],
        vocabulary=FAMILY.vocabulary(),
        battery={},
    )
    return context.publish("task-set", context.work_dir / "tasks")
