"""Words, phrases and sentences that the rule-based paraphraser may put for one another."""

from collections.abc import Iterator

# "from: to" each; a starred word is also of another part of speech and needs a fitting neighbour.
VERBS = """
accelerate: speed up; accept: take in; achieve: attain; acquire: obtain; adjust: adapt;
alter: modify; anticipate: expect; append: add; apply: employ; assess: evaluate; assign: allocate;
assume: suppose; attempt*: try; avoid: sidestep; begin: start; believe: think; build*: construct;
buy*: purchase; calculate: compute; change*: alter; check*: verify; choose: select;
clarify: explain; collect: gather; combine: merge; complete*: finish; compute: calculate;
confirm: verify; connect: link; construct: build; contain: hold; continue: carry on;
control*: govern; convert: transform; create: produce; decrease*: lower; define: specify;
delete: remove; demonstrate: display; denote: indicate; depend: rely; describe: explain;
detect: discover; determine: establish; differ: deviate; discover: find; discuss: talk about;
display*: present; eliminate: remove; employ: use; enable: permit; end*: finish; enhance: improve;
ensure: guarantee; establish: set up; estimate*: gauge; evaluate: assess; execute: carry out;
expand: extend; expect: anticipate; explain: clarify; extend: expand; fetch: retrieve;
find: discover; finish: complete; gather: collect; generate: produce; get: obtain; give: provide;
guarantee*: ensure; halt: stop; handle*: deal with; happen: occur; help*: assist;
identify: recognize; ignore: disregard; improve: enhance; include: incorporate; increase*: raise;
indicate: denote; inform: tell; initialize: set up; insert: put in; instantiate: create;
invoke: call; involve: entail; iterate: loop; join*: connect; keep: retain; limit*: restrict;
locate: find; maintain: keep up; measure*: gauge; mention: note; merge: combine; modify: alter;
monitor*: watch; need*: require; obtain: get; occur: happen; offer*: provide; omit: leave out;
operate: work; perform: carry out; permit*: allow; pick*: select; prevent: avert;
process*: handle; produce: generate; provide: supply; purchase*: buy; reach: attain;
reduce: decrease; refer: point; remove: delete; replace: substitute; represent: stand for;
require: need; restrict: limit; retain: keep; retrieve: fetch; return*: hand back; save: store;
search*: look; seem: appear; select: pick; show*: display; specify: indicate; split*: divide;
start*: commence; stop*: halt; store*: save; recommend: advise; supply*: provide;
transform*: convert; try*: attempt; use*: employ; utilize: use; verify: confirm; want: wish;
allow: permit
"""
NOUNS = """
advantage: benefit; aim: goal; algorithm: procedure; amount: quantity; approach*: method;
area: region; argument: parameter; attribute: property; author: writer; beginning: start;
benefit*: advantage; car: automobile; characteristic: trait; choice: option; collection: group;
company: firm; concept: idea; configuration: setup; container: holder; country: nation;
description: account; difference: distinction; directory: folder; disadvantage: drawback;
disease: illness; doctor: physician; effect*: impact; element: item; entry: record;
error: mistake; example: illustration; feature*: characteristic; film*: movie; folder: directory;
function*: routine; goal: aim; idea: notion; information: data; issue*: problem; item: element;
job: task; library: package; location: place; manner: way; method: procedure; mistake: error;
movie: film; object*: entity; operation: action; option: choice; package*: library;
parameter: argument; part*: portion; person: individual; picture*: image; portion: part;
problem: issue; property: attribute; purpose: aim; quantity: amount; question*: query;
reason*: cause; region: area; response: reply; result*: outcome; section: part; sequence: series;
situation: circumstance; stage*: phase; step*: stage; story: tale; strategy: approach;
student: pupil; task: job; teacher: instructor; technique: approach; type*: kind;
version: variant; way: manner
"""
OTHERS = """
about how: on how; accessible: available; additional: extra; additionally: moreover;
almost: nearly; also: additionally; although: though; always: invariably; appropriate: suitable;
approximately: roughly; automatically: on its own; available: accessible; because: since;
big: large; but: yet; but also: but likewise; not only: not just; in general: generally;
can be: may be; called by: invoked by; called with: invoked with; called on: invoked on;
is called when: is invoked when; common: usual; completely: entirely; complex: complicated;
correct*: right; correctly: properly; current: present; currently: at present; desired: wanted;
different: distinct; difficult: hard; directly: straight; distinct: different; each: every;
easily: readily; easy: simple; efficient: economical; entire: whole; entirely: wholly;
equivalent: equal; especially: particularly; every: each; exactly: precisely;
explicitly: expressly; extra: additional; extremely: highly; fast: quick; final: last;
finally: lastly; frequently: often; fully: completely; furthermore: moreover; general: broad;
helpful: useful; hence: thus; however: nevertheless; immediately: at once; important: significant;
individual: separate; initial: starting; initially: at first; inside: within; internal: inner;
large: big; likely: probable; main: principal; mainly: chiefly; many: numerous; may: might;
maybe: perhaps; merely: only; might: may; moreover: furthermore; multiple: several;
nearly: almost; necessary: needed; never: at no time; next: subsequent; normally: usually;
numerous: many; often: frequently; only: just; otherwise: if not; particular: specific;
perhaps: maybe; possible: feasible; precisely: exactly; previous: prior; previously: earlier;
primary: main; prior: previous; probably: likely; properly: correctly; quick: fast;
quickly: rapidly; rapidly: quickly; roughly: approximately; several: multiple; should: ought to;
significant: important; similar: comparable; simple: straightforward; simply: merely;
sometimes: occasionally; special: particular; specific: particular; suitable: appropriate;
therefore: thus; though: although; through: via; thus: therefore; typically: usually;
unique: distinct; until: till; upon: on; useful: helpful; usual: customary; usually: normally;
various: diverse; very: really; via: through; whether: if; whole: entire; within: inside;
wrong: incorrect
"""
PHRASES = """
a large number of: many; a lot of: plenty of; a number of: several; according to: as stated by;
are able to: can; as long as: provided that; as well as: and also; at least: no less than;
at most: no more than; based on: on the basis of; because of: owing to;
by default: unless stated otherwise; can be used to: serves to; due to: because of;
e.g.: for example; each of: every one of; even though: although; for example: for instance;
for instance: for example; has to: needs to; have to: need to; how to: the way to; i.e.: that is;
in addition: besides; in case: if; in order to: to; in particular: notably;
instead of: rather than; is able to: can; is used to: serves to; are used to: serve to;
kind of: sort of; lots of: plenty of; make sure: see to it; makes sure: sees to it;
making sure: seeing to it; most of: the majority of; need to: have to; needs to: has to;
note that: keep in mind that; of course: naturally; one of: one among; rather than: instead of;
should be: ought to be; so that: in such a way that; such as: like; the number of: the count of;
there are: one finds; there is: one finds; to be able to: to manage to; want to: would like to;
wants to: would like to; with respect to: regarding; is not: isn't; are not: aren't;
was not: wasn't; were not: weren't; do not: don't; does not: doesn't; did not: didn't;
cannot: can't; can not: can't; could not: couldn't; would not: wouldn't; should not: shouldn't;
will not: won't; has not: hasn't; have not: haven't; had not: hadn't; it is: it's;
you are: you're; we are: we're; they are: they're; you will: you'll; we will: we'll; i am: I'm;
i will: I'll; isn't: is not; aren't: are not; wasn't: was not; weren't: were not; don't: do not;
doesn't: does not; didn't: did not; can't: cannot; couldn't: could not; wouldn't: would not;
shouldn't: should not; won't: will not; hasn't: has not; haven't: have not; hadn't: had not;
you're: you are; we're: we are; they're: they are; i'm: I am; i've: I have; i'll: I will;
you'll: you will; we'll: we will; let's: let us
"""
# A sentence's parts in another order or another question; {0}, {1} … are what the groups matched,
# with a slash before a first letter that is lowered. Of several the seed chooses one.
REFRAMED = (
    (
        r"What does (.+) do\?",
        "Can you explain what {0} does?|What is the purpose of {0}?|Could you describe what {0} "
        "does?|Which purpose does {0} serve?",
    ),
    (
        r"What does (.+) say about (.+)\?",
        "Can you tell me what {0} says about {1}?|What can be read in {0} about {1}?",
    ),
    (
        r"(What|Who|Where) (is|are|was|were) ((?:the|a|an|my|your|some)\b [^,]+)\?",
        "Can you tell me {/0} {2} {1}?|Do you know {/0} {2} {1}?|Could you say {/0} {2} {1}?",
    ),
    (
        r"How (?:can|do|should|could|would) (?:I|we|you|one) (.+)\?",
        "What is a good way to {0}?|Which is the way to {0}?",
    ),
    (r"How (?:to) (.+)\?", "What is a good way to {0}?|In which way does one {0}?"),
    (r"How ((?:is|are|was|were|does|do|did|can|could|would|will) .+)\?", "In what way {0}?"),
    (r"Why ((?:is|are|was|were|does|do|did|can|would|will|should) .+)\?", "For what reason {0}?"),
    (r"(?:Can|Could) you (?:please )?(.+)\?", "Would you be able to {0}?|Would you please {0}?"),
    (r"Is it possible to (.+)\?", "Can one {0}?|Is there a way to {0}?"),
    (r"(Is|Are) there (.+)\?", "Do you know if there {/0} {1}?|Can you say if there {/0} {1}?"),
    (
        r"What (should|can|could|would|must) (I|we|you|one) (.+)\?",
        "Could you tell me what {1} {0} {2}?|Can you say what {1} {0} {2}?",
    ),
    (
        r"(Explain|Discuss|Summarize|Summarise|Suggest|Give me|Tell me|Show me) ([^.?!]+)[.]?",
        "Could you {/0} {1}?|Please {/0} {1}.",
    ),
    (
        r"(Write|Come up|Imagine|Act|Rewrite|Translate|Help me|Recommend|Pretend|Draft|Compose|"
        r"Plan) ([^.?!]+)[.]?",
        "Could you {/0} {1}?|Please {/0} {1}.|I would like you to {/0} {1}.",
    ),
    (
        r"(If|When|While|Because|Although|Unless|Once|Whenever) ([^,;:]+), (?:then )?([^,;:]+)"
        r"([.!])",
        "{2} {/0} {1}{3}",
    ),
    (
        r"(In|For|With|On|At|By|During|After|Before) ((?:[^\s,;:]+ ){1,7}[^\s,;:]+), "
        r"((?!and |or )[^,;:]+)([.!])",
        "{2} {/0} {1}{3}",
    ),
    (r"To ([^,;:]+), ([^,;:]+)([.!])", "{1} to {0}{2}"),
    (
        r"((?:[^\s,;:]+ )+[^\s,;:]+)(?<!\bor)(?<!\band)(?<!\beven)(?<!\bonly)(?<!\bas)(?<!\bcheck)"
        r"(?<!\bchecks)(?<!\bdetermine)(?<!\bdetermines)(?<!\bsee)(?<!\bknow)(?<!\btest) "
        r"(if|when|because|unless|although) ([^,;:]+ [^,;:]+)([.!])",
        "{^1} {2}, {/0}{3}",
    ),
    # Any other question, last: what comes before it would have fitted as well.
    (
        r"((?:Can|Could|Do|Does|Did|Is|Are|Was|Were|Has|Have|Will|Would|Should|What|Which|Who|Where|"
        r"When|How|Why)\b.+)\?",
        "Can you tell me: {/0}?|I would like to know: {/0}?|Do you know: {/0}?",
    ),
)
# First words that are written small when they come to stand inside a sentence.
LOWERED = frozenset(
    word
    for line in (
        "a all an any are as at both by can could do each every few for give how if in is it its "
        "many most much my no not of on one other our several she he show some such tell that the "
        "their there these they this those to use we what when where which while who you your",
        "although because during after before explain discuss suggest summarize summarise unless "
        "once whenever with was were has have will would should does did write come imagine act "
        "rewrite translate help recommend pretend draft compose plan me",
    )
    for word in line.split()
)

PAST = {
    "begin": ("began", "begun"),
    "build": ("built",),
    "buy": ("bought",),
    "choose": ("chose", "chosen"),
    "deal": ("dealt",),
    "find": ("found",),
    "get": ("got", "gotten"),
    "give": ("gave", "given"),
    "hold": ("held",),
    "keep": ("kept",),
    "leave": ("left",),
    "put": ("put",),
    "set": ("set",),
    "show": ("showed", "shown"),
    "split": ("split",),
    "stand": ("stood",),
    "take": ("took", "taken"),
    "tell": ("told",),
    "think": ("thought",),
}
DOUBLED = (
    "begin",
    "get",
    "occur",
    "omit",
    "permit",
    "plan",
    "put",
    "refer",
    "set",
    "split",
    "stop",
)
SIBILANT = ("s", "x", "z", "ch", "sh")


def entries(table: str) -> Iterator[tuple[str, str, bool]]:
    """Yield word, replacement and whether it needs a fitting neighbour."""
    for entry in " ".join(table.split()).split(";"):
        word, _, replacement = entry.strip().partition(": ")
        yield word.removesuffix("*"), replacement, word.endswith("*")


def plural(word: str) -> str:
    """Return the plural of a regular noun, or the third person of a regular verb."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(SIBILANT) else f"{word}s"


def conjugated(verb: str) -> dict[str, tuple[str, ...]]:
    """Return the forms of a verb by name; only its first word changes ("hand back")."""
    head, space, rest = verb.partition(" ")
    doubled = f"{head}{head[-1]}" if head in DOUBLED else head
    stem = head[:-1] if head.endswith("e") and not head.endswith("ee") else doubled
    past = f"{head[:-1]}ied" if head.endswith("y") and head[-2] not in "aeiou" else f"{stem}ed"
    forms = {
        "base": (head,),
        "third": (plural(head),),
        "past": PAST.get(head, (past,)),
        "ing": (f"{stem}ing",),
    }
    return {name: tuple(f"{form}{space}{rest}" for form in found) for name, found in forms.items()}
