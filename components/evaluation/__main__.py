"""`python -m components.evaluation [evaluation|origin|champion|gate|promotion|rejected] --config file.yaml`"""

import sys

from components.runtime.stage import main

STAGES = {
    "origin": "Origin",
    "champion": "Champion",
    "gate": "Gate",
    "promotion": "Promotion",
    "rejected": "Rejected",
}

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and arguments[0] in STAGES:
        name = arguments[0]
        main(
            name,
            run=f"components.evaluation.{name}:run",
            config_class=f"components.evaluation.{name}:{STAGES[name]}Config",
            arguments=arguments[1:],
        )
    else:
        main("evaluation", arguments=arguments[1:] if arguments[:1] == ["evaluation"] else arguments)
