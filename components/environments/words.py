"""Words that the families share: what a small model learns about copying a name in one family holds in all of them."""

PEOPLE = tuple(
    """ada bruno carla dmitri elena farid greta hugo irene jonas
       kaori liam mona nils olga pavel rosa sven tara yusuf""".split()
)
TEAMS = tuple("core data design field growth infra legal mobile payments platform research support".split())
COMPANIES = tuple("acme borealis cobalt delphi everest fjord granite helios indigo juniper kestrel lumen".split())
CITIES = tuple("athens bergen cairo dakar geneva lima osaka quito riga tunis".split())
PRODUCTS = tuple("anvil beacon comet drift ember falcon glider harbor iris jigsaw".split())
NUMBERS = tuple(map(str, range(100)))
