"""Quality gates of paraphrases: what a text must keep, and signs that it was not rephrased."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

LEAST, MOST = 0.5, 2.0  # characters of a paraphrase, of its original's
CONTENT = 4  # letters of a word that says what a text is about
FEW = 3  # content words; a text of fewer may share none with its paraphrase

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Three backticks or more run on to as many; one or two end within their paragraph.
CODE = re.compile(
    r"(`{3,})(?!`).+?(?<!`)\1(?!`)|(?<!`)(`{1,2})(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\2(?!`)", re.DOTALL
)
WORD = re.compile(r"[^\W\d_]+")
VERBS = """
add analyze answer arrange ask brainstorm build calculate categorize change choose classify
code combine compare complete compose compute consider construct continue convert correct
create critique define describe design determine develop discuss draft edit elaborate
enumerate estimate evaluate expand explain extract fill find fix format formulate generate
give guess help identify illustrate imagine implement improve infer invent justify let list
make mention name offer organize outline paraphrase pick plan play please predict prepare
pretend produce propose prove provide rank read recommend rephrase reply respond rewrite
search select share show simplify solve sort speak specify state suggest summarise summarize
take teach tell think transcribe transform translate turn use verify write
"""
IMPERATIVES = frozenset(VERBS.split())
REQUESTS = re.compile(
    r"\b(?:i(?: would|['’]d|['’]m| am)? (?:want|need|like|look|wonder|hope|curious|interested)|"
    r"looking for|wondering|curious|is it possible|how|what|why|which|whether)\b",
    re.IGNORECASE,
)
PREAMBLE = re.compile(
    r"\W*(?:sure\b|certainly[,!.]|of course[,!.]|absolutely[,!.]|here(?:['’]s| is| are)\b|"
    r"i(?:['’]m| am) (?:sorry|unable)|i can(?: ?not|['’]t)|as an ai\b|sorry[,!.])",
    re.IGNORECASE,
)


def not_identical(original: str, paraphrase: str) -> bool:
    """Whether the texts differ in more than case and white space."""
    return original.casefold().split() != paraphrase.casefold().split()


def length(original: str, paraphrase: str) -> bool:
    """Whether the paraphrase has .5 to 2 times the characters of the original."""
    return LEAST <= len(paraphrase.strip()) / max(1, len(original.strip())) <= MOST


def numbers_kept(original: str, paraphrase: str) -> bool:
    """Whether both hold the same numbers equally often, in any order."""
    return Counter(NUMBER.findall(original)) == Counter(NUMBER.findall(paraphrase))


def code_kept(original: str, paraphrase: str) -> bool:
    """Whether both hold the same code between backticks or fences, in any order."""
    found = [Counter(m[0] for m in CODE.finditer(t)) for t in (original, paraphrase)]
    return found[0] == found[1]


def words_kept(original: str, paraphrase: str) -> bool:
    """Whether a content word (of four letters or more) is shared, if the original has three."""
    found = [
        {word for word in WORD.findall(text.casefold()) if len(word) >= CONTENT}
        for text in (original, paraphrase)
    ]
    return len(found[0]) < FEW or bool(found[0] & found[1])


def not_executed(original: str, paraphrase: str) -> bool:
    """Whether a text that asks for something still asks: the task was rephrased, not done.

    A heuristic. The original asks if it ends with a question mark or begins with an imperative
    (translate, write, list …). The paraphrase asks if it holds a question mark, an imperative
    anywhere, or words of a request (I would like, wondering, how, what …). A paraphrase that does
    the task and happens to hold such a word passes; an original that asks in another way, such as
    in its midst, is not looked at.
    """
    words = WORD.findall(original.casefold())
    asks = original.rstrip("\"'”’) \n\t").endswith("?") or (bool(words) and words[0] in IMPERATIVES)
    if not asks or "?" in paraphrase:
        return True
    still = IMPERATIVES.intersection(WORD.findall(paraphrase.casefold()))
    return bool(still) or REQUESTS.search(paraphrase) is not None


def no_preamble(original: str, paraphrase: str) -> bool:
    """Whether a paraphrase begins like a reply ("Sure,", "Here is", "I'm sorry") only as before."""
    return PREAMBLE.match(paraphrase) is None or PREAMBLE.match(original) is not None


# In the order in which they are asked; the first that refuses is the one that is counted.
GATES: dict[str, Callable[[str, str], bool]] = {
    "length": length,
    "no_preamble": no_preamble,
    "not_executed": not_executed,
    "numbers_kept": numbers_kept,
    "code_kept": code_kept,
    "words_kept": words_kept,
    "not_identical": not_identical,
}


def gates_of(role: str, kind: str, settings: Mapping) -> list[str]:
    """Return the gates that a paraphrase goes through.

    An answer asks for nothing. Rules below full strength may leave a text as it is: a dial that
    dropped what it left unchanged would change the samples with it, and strength 0 is a copy.
    """
    left_out = {"not_executed"} if role == "answer" else set()
    if kind == "rules" and settings["strength"] < 1:
        left_out.add("not_identical")
    return [gate for gate in GATES if gate not in left_out]


def refusal(original: str, paraphrase: str, gates: Sequence[str]) -> str | None:
    """Return the first gate that refuses a paraphrase, None if it passes all."""
    return next((gate for gate in gates if not GATES[gate](original, paraphrase)), None)
