"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks, made without a network.

Wording, task settings, steps of length and scores are the benchmark's. The running text is a file
of the user's or the language reference of CPython instead of essays from the web; the words are
those of the package wonderwords, as in RULER.
"""

from locret.tasks.ruler.base import RulerTask
from locret.tasks.ruler.documents import HotpotQA, Squad
from locret.tasks.ruler.needles import (
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultiquery,
    NiahMultivalue,
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
)
from locret.tasks.ruler.variables import VariableTracking
from locret.tasks.ruler.words import CommonWords, FrequentWords

RULER_TASKS: tuple[type[RulerTask], ...] = (
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultivalue,
    NiahMultiquery,
    VariableTracking,
    CommonWords,
    FrequentWords,
    Squad,
    HotpotQA,
)
