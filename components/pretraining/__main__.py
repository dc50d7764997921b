"""python -m components.pretraining --config pretraining.yaml"""

from components.runtime.stage import main

if __name__ == "__main__":
    main("pretraining")
