"""What prompts are made of: pairs of words of a kind, and how a prompt states them."""

from __future__ import annotations


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """ "a b, c d" -> pairs; names of several words have _ for their blanks."""
    halves = (pair.split() for pair in text.replace("\n", " ").split(","))
    return tuple((a.replace("_", " "), b.replace("_", " ")) for a, b in halves)


KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "capital": _pairs(
        """France Paris, England London, Italy Rome, Spain Madrid, Germany Berlin, Russia Moscow, Japan Tokyo, China
        Beijing, Egypt Cairo, Greece Athens, Portugal Lisbon, Austria Vienna, Ireland Dublin, Norway Oslo, Sweden
        Stockholm, Finland Helsinki, Poland Warsaw, Hungary Budapest, Turkey Ankara, Cuba Havana, Peru Lima, Chile
        Santiago, Kenya Nairobi, Iran Tehran, Iraq Baghdad, Syria Damascus, Canada Ottawa, Denmark Copenhagen,
        Belgium Brussels, Ukraine Kiev"""
    ),
    "currency": _pairs(
        """Japan yen, Mexico peso, India rupee, Russia ruble, China yuan, Britain pound, America dollar, Denmark krone,
        Poland zloty, Thailand baht, Israel shekel, Korea won, Brazil real, Turkey lira, Germany mark, France franc"""
    ),
    "plural": _pairs(
        """man men, woman women, child children, foot feet, tooth teeth, mouse mice, goose geese, ox oxen, knife
        knives, wife wives, life lives, leaf leaves, wolf wolves, house houses, tree trees, bird birds, horse
        horses, city cities, lady ladies, story stories, baby babies, box boxes, church churches, hand hands, word
        words, road roads, ship ships, king kings, door doors, book books"""
    ),
    "comparative": _pairs(
        """good better, bad worse, big bigger, small smaller, old older, young younger, tall taller, short shorter,
        long longer, strong stronger, weak weaker, fast faster, slow slower, hot hotter, cold colder, warm warmer,
        rich richer, poor poorer, dark darker, bright brighter, happy happier, heavy heavier, easy easier, high
        higher, low lower, deep deeper, wide wider, great greater, soft softer, cheap cheaper"""
    ),
    "opposite": _pairs(
        """hot cold, up down, day night, black white, good bad, big small, old new, early late, left right, north
        south, east west, open closed, rich poor, love hate, war peace, life death, true false, first last, high
        low, fast slow, light dark, happy sad, hard soft, strong weak, full empty, begin end, friend enemy, always
        never, more less, inside outside"""
    ),
    "family": _pairs(
        """father mother, son daughter, brother sister, husband wife, king queen, uncle aunt, nephew niece, boy girl,
        man woman, prince princess, he she, him her, grandfather grandmother, actor actress, waiter waitress, duke
        duchess, gentleman lady, sir madam, groom bride, bull cow"""
    ),
    "past": _pairs(
        """go went, see saw, take took, give gave, come came, make made, say said, know knew, find found, think
        thought, tell told, leave left, bring brought, begin began, keep kept, hold held, write wrote, stand stood,
        hear heard, meet met, run ran, sit sat, speak spoke, lie lay, lead led, read read, grow grew, lose lost,
        fall fell, send sent, build built, break broke, rise rose, drive drove, buy bought, wear wore"""
    ),
    "home": _pairs(
        """bee hive, bird nest, lion den, dog kennel, horse stable, spider web, king palace, monk monastery, nun
        convent, priest church, soldier barracks, prisoner prison, pig sty, cow barn, sailor ship, farmer farm,
        doctor hospital, teacher school, judge court, actor theatre"""
    ),
}
"""Kind of pair -> (key, value)."""

TEMPLATES: dict[str, str] = {
    "is to as": "{a} is to {b} as {c} is to",
    "colons": "{a} : {b} = {c} :",
    "arrows": "{a} -> {b}, {c} ->",
    "lines": "{a}: {b}\n{c}:",
    "goes with": "{a} goes with {b}, and {c} goes with",
    "pair": "The pair of {a} is {b}. The pair of {c} is",
}
"""How a prompt states two pairs, the second one without its end."""

RECALL: dict[str, tuple[str, str]] = {
    "blanks": (" {k} {v}", ""),
    "commas": (" {k} {v}", ","),
    "semicolons": (" {k} {v}", ";"),
    "stops": (" {k} {v}", "."),
    "calls": (" {k} {v}", "!"),
    "lines": (" {k} {v}", "\n"),
    "articles": (" the {k} {v}", ","),
    "and": (" {k} and {v}", ","),
}
"""How a list of pairs is written for recall: a pair, and what stands between two."""
