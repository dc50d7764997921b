"""`python -m components.synthesis --config file.yaml`"""

from components.runtime.stage import main

if __name__ == "__main__":
    main("synthesis")
