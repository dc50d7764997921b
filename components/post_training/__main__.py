"""python -m components.post_training --config post_training.yaml"""

from components.runtime.stage import main

if __name__ == "__main__":
    main("post_training")
