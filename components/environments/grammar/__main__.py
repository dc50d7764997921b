"""`python -m components.environments.grammar 17`: what environment 17 is, and one of its tasks with the solution."""

import random
import sys

from components.environments.grammar.definitions import compile_environment
from components.environments.grammar.environment import CompiledEnvironments
from components.environments.grammar.programs import programs


def describe(number: int) -> str:
    """Schema, tools and rules of environment `number`, and a sample task, as text."""
    definition = compile_environment(number)
    design, family = definition.design, CompiledEnvironments()
    lines = [
        f"{definition.name}",
        f"  relations  {', '.join(definition.relations)} (each entity has one)",
        f"  list       {definition.listing or 'none'}" + (f" ({design.listing})" if definition.listing else ""),
        f"  found by   {definition.code or 'name only'}",
        f"  gate       {design.gate}",
        "tools",
    ]
    lines += [
        f"  {tool.name}({', '.join(tool.input_schema['properties'])})  {tool.description}"
        for tool in definition.tools()
    ]
    task = family.generate(programs(number)[-1].template, 0, "train")
    lines += [f"a task of {task.template}", f"  user       {task.messages[0].content}"]
    for message in family.play(task, "careful", random.Random(0)).messages[1:]:
        calls = [f"{call.name}({', '.join(map(str, call.arguments.values()))})" for call in message.tool_calls]
        lines.append(f"  {message.role:<10} {' '.join([message.content, *calls]).strip()}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("usage: python -m components.environments.grammar NUMBER")
    print(describe(int(sys.argv[1])))
