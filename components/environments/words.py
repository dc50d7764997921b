"""Words that the families share: what a small model learns about copying a name in one family holds in all of them."""

PEOPLE = (
    *("ada", "bruno", "carla", "dmitri", "elena", "farid", "greta", "hugo", "irene", "jonas"),
    *("kaori", "liam", "mona", "nils", "olga", "pavel", "rosa", "sven", "tara", "yusuf"),
)
TEAMS = (
    *("core", "data", "design", "field", "growth", "infra"),
    *("legal", "mobile", "payments", "platform", "research", "support"),
)
COMPANIES = (
    *("acme", "borealis", "cobalt", "delphi", "everest", "fjord"),
    *("granite", "helios", "indigo", "juniper", "kestrel", "lumen"),
)
CITIES = ("athens", "bergen", "cairo", "dakar", "geneva", "lima", "osaka", "quito", "riga", "tunis")
PRODUCTS = ("anvil", "beacon", "comet", "drift", "ember", "falcon", "glider", "harbor", "iris", "jigsaw")
NUMBERS = tuple(map(str, range(100)))
