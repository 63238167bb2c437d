"""Quantities as a value and a unit, in any spelling: ``864 \\mbox{ inches}^2`` and ``864 sq. in.`` are equal.

A unit is a set of base names with powers: ``meters per second`` and ``\\frac{m}{s}`` are both ``m`` to the power 1
and ``s`` to the power -1. Units are not converted: 100 cm is not 1 m, as a problem names the unit that it asks for.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# canonical name: its spellings; plurals in s and es, and full stops, are recognized too
_SPELLINGS = {
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "nmi": "nmi nauticalmile",
    "ly": "ly lightyear",
    "acre": "acre",
    "ha": "ha hectare",
    "gal": "gal gallon",
    "qt": "qt quart",
    "pt": "pt pint",
    "cup": "cup",
    "tbsp": "tbsp tablespoon",
    "tsp": "tsp teaspoon",
    "floz": "floz fluidounce",
    "oz": "oz ounce",
    "lb": "lb lbs pound",
    "ton": "ton",
    "t": "tonne metricton",
    "min": "min mins minute",
    "h": "h hr hour",
    "d": "d day",
    "week": "wk week",
    "month": "mo month",
    "year": "yr year",
    "decade": "decade",
    "century": "century centuries",
    "degree": "deg degree °",
    "celsius": "°C celsius centigrade degC degreecelsius",
    "fahrenheit": "°F fahrenheit degF degreefahrenheit",
    "K": "K kelvin",
    "rad": "rad radian",
    "percent": "% pct percent percentage",
    "dollar": "$ USD dollar buck usdollar",
    "cent": "¢ cent",
    "euro": "€ EUR euro",
    "gbp": "£ GBP poundsterling",
    "yen": "¥ JPY yen",
    "rupee": "₹ Rs rs INR rupee",
    "atm": "atm atmosphere",
    "rev": "rev revolution",
    "dozen": "dozen",
    "unit": "unit",
}
_SI = {
    "m": "meter metre",
    "g": "gram gramme",
    "s": "sec second",
    "L": "liter litre l",
    "W": "watt",
    "J": "joule",
    "N": "newton",
    "Pa": "pascal",
    "V": "volt",
    "A": "amp ampere",
    "Hz": "hertz",
    "mol": "mole",
    "cal": "calorie",
    "eV": "electronvolt",
    "B": "byte",
    "Ω": "ohm",
}
_PREFIXES = {
    "": "", "k": "kilo", "h": "hecto", "d": "deci", "c": "centi", "m": "milli", "µ": "micro", "n": "nano",
    "M": "mega", "G": "giga", "T": "tera",
}  # fmt: skip
_COMPOSITE = {
    "mph": "mi / h", "kph": "km / h", "kmh": "km / h", "kmph": "km / h", "fps": "ft / s", "mps": "m / s",
    "rpm": "rev / min", "mpg": "mi / gal", "cc": "cm ^3", "sqft": "ft ^2", "sqin": "in ^2", "sqm": "m ^2",
    "psi": "lb / in ^2", "gm": "g", "kwh": "kW h",
}  # fmt: skip
# Words that occur without \text{}: counted things, not units of measure
_COUNTED = "people person ways way points point sides side times students apples marbles coins cards books games"
# Words after a number that change its meaning: neither units nor nouns
CHANGES = re.compile(
    r"(?<!\\)\b(?:hundred|thousand|million|billion|trillion|dozens?|pi|half|halves|quarters?|thirds?|or|and|more|less|least|"
    r"most|not|no|remainder|mod|modulo|base|from|to|if|is|when|where|for|squared|cubed|choose|factorial|above|below|"
    r"about|each|east|west|north|south|am|pm|[ap]\.m|undefined|infinit[ey])\b",
    re.I,
)
NOUN = "noun"  # any counted thing
_POWER_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWER_AFTER = {"squared": 2, "cubed": 3}


def _table() -> dict[str, str]:
    found = {word: name for name, words in _SPELLINGS.items() for word in words.split()}
    for name, words in _SI.items():
        for short, long in _PREFIXES.items():
            found.setdefault(short + name, short + name)
            for word in words.split():
                found.setdefault((short if len(word) == 1 else long) + word, short + name)
    return found


_TABLE = _table()
_FOLDED: dict[str, str] = {}
for _word, _name in _TABLE.items():
    _FOLDED.setdefault(_word.lower(), _name)

Unit = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value and its unit.

    Attributes:
        value: text of the value.
        unit: base names with their powers, sorted; None if there is none.
    """

    value: str
    unit: Unit | None


def find_unit(word: str) -> str | None:
    """Return a unit's canonical name, None if the word is no unit. Case counts where it distinguishes units."""
    for form in (word, word[:-1] if word.endswith("s") else "", word[:-2] if word.endswith("es") else ""):
        if form in _TABLE:
            return _TABLE[form]
    low = word.lower()
    for form in (low, low[:-1] if low.endswith("s") else "", low[:-2] if low.endswith("es") else ""):
        if len(form) > 1 and form in _FOLDED:  # for one letter case counts: M is no meter, and C no cent
            return _FOLDED[form]
    return None


_MARKUP = re.compile(r"\\(?:text|mbox|mathrm)\b|\\[,;:!]|\\ |\\cdot(?![a-z])|[{}~()*·\s]+|(?<!\^)-")
_FRACTION = re.compile(r"\\frac\s*(\{(?:[^{}]|\{[^{}]*\})*\})\s*(\{(?:[^{}]|\{[^{}]*\})*\})")
_WORDS = (
    (re.compile(r"\^\s*\{?\s*\\?(?:circ|degree)(?![a-z])\s*\}?|\\degree(?![a-z])|\^\s*\{?\s*°\s*\}?"), " ° "),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\^\s*\{?\s*(-?\d)\s*\}?"), r" ^\1 "),
    (re.compile(r"(?<=[A-Za-z])([23])\b"), r" ^\1 "),  # cm2
    (re.compile("²"), " ^2 "),
    (re.compile("³"), " ^3 "),
)
_MANY = (
    (re.compile(r"(?:°|\bdeg(?:ree)?s?)\s*(?:C\b|celsius\b)", re.I), " celsius "),
    (re.compile(r"(?:°|\bdeg(?:ree)?s?)\s*(?:F\b|fahrenheit\b)", re.I), " fahrenheit "),
    (re.compile(r"\bnautical\s+miles?\b", re.I), " nmi "),
    (re.compile(r"\blight\s+years?\b", re.I), " ly "),
    (re.compile(r"\b(?:fl|fluid)\.?\s+(?:oz|ounces?)\b", re.I), " floz "),
    (re.compile(r"\bmetric\s+tons?\b", re.I), " tonne "),
    (re.compile(r"\b(?:US|U\.S\.)\s+dollars?\b", re.I), " dollar "),
    (re.compile(r"\bpounds?\s+sterling\b", re.I), " gbp "),
    (re.compile(r"\bper\s+cent\b", re.I), " percent "),
    (re.compile(r"\bpercentage\s+points?\b", re.I), " percent "),
)
_EXTENT = re.compile(r"\b(?:long|tall|wide|high|deep|old|away|apart|in total|total)\s*$", re.I)
_TOKEN = re.compile(r"\^-?\d|/|[%$°¢€£¥₹](?:[CF]\b)?|[^\W\d_]+")


def parse_unit(text: str) -> Unit | None:
    """Return the unit in a text, None if the text is none."""
    text = _FRACTION.sub(r" \1 / \2 ", text)
    for pattern, with_ in _WORDS:
        text = pattern.sub(with_, text)
    text = re.sub(r"(?<=\w)\.", " ", _MARKUP.sub(" ", text))  # full stops of abbreviations
    for pattern, with_ in _MANY:
        text = pattern.sub(with_, text)
    tokens = list(_tokens(_EXTENT.sub(" ", text)))
    if not tokens or None in tokens:
        return None
    powers: Counter[str] = Counter()
    sign, before, last = 1, 1, None  # everything after the first "per" is in the denominator
    for token in tokens:
        low = token.lower()
        if low in ("/", "per") or (last and low in ("a", "an", "each", "every")):  # miles an hour
            sign, last = -1, None
        elif low in _POWER_BEFORE:
            before = _POWER_BEFORE[low]
        elif last and (low in _POWER_AFTER or token[0] == "^"):
            powers[last] += ((_POWER_AFTER.get(low) or int(token[1:])) - 1) * sign
        elif (name := find_unit(token)) is not None:
            powers[name] += before * sign
            before, last = 1, name
        else:
            return None
    if last is None or before != 1:
        return None
    return tuple(sorted((name, power) for name, power in powers.items() if power)) or None


def _tokens(text: str) -> Iterator[str | None]:
    """Yield a unit's words, with composites expanded; None for other text."""
    end = 0
    for match in _TOKEN.finditer(text):
        if text[end : match.start()].strip():
            yield None
        end = match.end()
        yield from _COMPOSITE.get(match[0].lower(), match[0]).split()
    if text[end:].strip():
        yield None


_PIECE = r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}"
_STARTS = re.compile(
    rf"(?P<text>(?:/\s*)?{_PIECE}|\\frac\s*\{{\s*{_PIECE})|(?P<sign>\^\s*\{{?\s*\\?(?:circ|degree|°)|\\degree|°|\\?%|¢|\\\$$|€$|£$)"
    r"|(?P<word>(?:(?<=[\d)}])\s*|(?<=[\w)}])\s+)[^\W\d_]+)"
)
_CURRENCY = re.compile(r"^([-+]?)\s*(\\\$|[$€£¥₹]|Rs\.?(?=\s*\d))\s*(?=[-+.\d\\])")
_NOUN_TAIL = re.compile(r"(?:\s|\\(?:text|mbox|mathrm)\s*\{[\s\w.,'()-]*\})+")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:[\d.,/\s{}]|\\frac|\\pi(?![a-z])|\\sqrt|\\cdot|\\times)+")


def split_unit(text: str, *, letters: bool) -> Quantity:
    """Return a quantity's value and unit.

    Args:
        text: one cleaned value, not a list.
        letters: whether a single letter after the number, outside ``\\text{}``, is a unit (``5 m``) and no variable.
    """
    currency: Unit | None = None
    if match := _CURRENCY.match(text):
        currency = ((find_unit(match[2].strip("\\.")) or "dollar", 1),)
        text = match[1] + text[match.end() :]
    for match in _STARTS.finditer(text):
        value, tail = text[: match.start()].rstrip(), text[match.start() :]
        if not value or value[-1] in "+-*/=^_(,{[" or value.endswith("\\"):
            continue
        if match["word"]:
            if not _PLAIN_NUMBER.fullmatch(value):
                continue
            if not letters and re.fullmatch(r"\s*[a-zA-Z](?:[\^/].*)?", tail):
                continue
        if (unit := parse_unit(tail)) is not None:
            return Quantity(value, _times(currency, unit))
        words = re.sub(r"\\(?:text|mbox|mathrm)|[{}]", " ", tail).strip()
        if CHANGES.search(words):
            continue
        if _NOUN_TAIL.fullmatch(tail) and re.search(r"[^\W\d_]{2}", words):
            return Quantity(value, _times(currency, ((NOUN, 1),)))
        if match["word"] and words.lower() in _COUNTED.split():
            return Quantity(value, _times(currency, ((NOUN, 1),)))
    return Quantity(text, currency)


def split_compound(text: str) -> list[str]:
    """Return the parts of a quantity with several units, ``3 hours 20 minutes``; else the text alone."""
    parts = re.split(r"(?<=[a-zA-Z}.])\s+(?=\d)", text)
    units = [split_unit(part, letters=True).unit for part in parts]
    return parts if len(parts) > 1 and None not in units and len(set(units)) == len(units) else [text]


def _times(currency: Unit | None, unit: Unit) -> Unit:
    """Return a unit with the currency before the number: ``$5 per hour``. In ``$5 dollars`` it counts once."""
    if currency is None or currency[0] in unit:
        return unit
    return tuple(sorted((*currency, *unit)))


def same_unit(ours: Unit | None, theirs: Unit | None) -> bool:
    """Return whether two units agree. A missing unit agrees with any unit."""
    return ours is None or theirs is None or ours == theirs
