"""The TeX of these pages as MathML, which browsers draw by themselves: no script, no font and no network is needed.

Only what the pages use is known; anything else is an error, so that `mkdocs build --strict` fails instead of showing
raw TeX.  GitHub reads the same `$…$` in the Markdown files.
"""

from __future__ import annotations

import re
from html import escape

_TOKEN = re.compile(r"\\begin\{\w+\}|\\end\{\w+\}|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|\s+|.", re.S)

_GREEK = dict(
    zip(
        "alpha beta gamma delta epsilon varepsilon eta theta kappa lambda mu pi rho varrho sigma tau ell infty".split(),
        "αβγδϵεηθκλμπρϱστℓ∞",
    )
) | {"Delta": "Δ", "Phi": "Φ", "Sigma": "Σ", "Omega": "Ω", "phi": "φ", "omega": "ω", "xi": "ξ", "nu": "ν", "zeta": "ζ"}

_SIGNS = {
    "mid": "|", "cdot": "·", "nabla": "∇", "partial": "∂", "pm": "±", "propto": "∝", "le": "≤", "ge": "≥", "ne": "≠",
    "neq": "≠", "in": "∈", "to": "→", "leftarrow": "←", "equiv": "≡", "approx": "≈", "sim": "∼", "times": "×",
    "setminus": "∖", "bullet": "•", "dots": "…", "ldots": "…", "odot": "⊙", "langle": "⟨", "rangle": "⟩",
    "lVert": "‖", "rVert": "‖", "Vert": "‖", "lvert": "|", "rvert": "|", "star": "⋆", "ast": "∗", "ll": "≪", "gg": "≫",
    "{": "{", "}": "}", "|": "‖",
}  # fmt: skip
_LARGE = {"sum": "∑", "prod": "∏", "int": "∫"}
_FUNCTIONS = {"log", "exp", "max", "min", "sin", "cos", "tanh", "det", "arg", "sup", "inf", "lim", "Pr"}
_SPACES = {",": ".17em", ";": ".28em", ":": ".22em", "!": "-.17em", " ": ".25em", "quad": "1em", "qquad": "2em"}
_ACCENTS = {"hat": "^", "bar": "¯", "overline": "¯", "tilde": "~", "vec": "→", "dot": "˙"}
_SIZES = {"left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "bigg", "Bigg"}
_DOUBLE = {"E": "𝔼", "R": "ℝ", "N": "ℕ", "Z": "ℤ", "P": "ℙ", "1": "𝟙"}


class _Reader:
    """A recursive reader of one formula."""

    def __init__(self, tex: str) -> None:
        self.tokens = _TOKEN.findall(tex)
        self.at = 0
        self.tex = tex

    def peek(self) -> str:
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise ValueError(f"the formula ends too early: {self.tex}")
        self.at += 1
        return token

    def row(self, *ends: str) -> str:
        """Everything up to one of `ends` (which is left) or the end of the formula."""
        parts = []
        while self.peek() and self.peek() not in ends:
            parts.append(self.scripted())
        return f"<mrow>{''.join(parts)}</mrow>"

    def words(self) -> str:
        """The plain text of a `{…}`, with its spaces."""
        if self.take() != "{":
            raise ValueError(f"\\text and \\operatorname need braces: {self.tex}")
        begin = self.at
        while self.tokens[self.at] != "}":
            self.at += 1
        self.at += 1
        return "".join(self.tokens[begin : self.at - 1])

    def scripted(self) -> str:
        base, large = self.atom()
        low = high = ""
        while self.peek() in ("_", "^", "'"):
            mark = self.take()
            if mark == "_":
                low = self.argument()
            elif mark == "^":
                high += self.argument()
            else:
                high += "<mo>′</mo>"
        if not low and not high:
            return base
        high = f"<mrow>{high}</mrow>"
        kind = "underover" if large else "subsup"
        if low and high != "<mrow></mrow>":
            return f"<m{kind}>{base}{low}{high}</m{kind}>"
        name, script = (kind[: 5 if large else 3], low) if low else (kind[5 if large else 3 :], high)
        return f"<m{name}>{base}{script}</m{name}>"

    def atom(self) -> tuple[str, bool]:
        """One thing that scripts can hang on, and whether its limits stand above and below it."""
        token = self.take()
        if token == "{":
            inner = self.row("}")
            self.take()
            return inner, False
        if re.fullmatch(r"[\d.]*\d", token):
            return f"<mn>{token}</mn>", False
        if not token.startswith("\\"):
            if token.isalpha():
                return f"<mi>{token}</mi>", False
            return f"<mo{_fixed(token)}>{escape({'-': '−', '*': '∗'}.get(token, token))}</mo>", False
        return self.command(token[1:])

    def argument(self) -> str:
        """What a command or a script takes without braces: one group, letter or digit."""
        digits = self.peek()
        if digits.isdigit() and len(digits) > 1:
            self.tokens[self.at : self.at + 1] = [digits[0], digits[1:]]
        return self.atom()[0]

    def command(self, name: str) -> tuple[str, bool]:
        if name in _GREEK:
            return f"<mi>{_GREEK[name]}</mi>", False
        if name in _SIGNS:
            return f"<mo{_fixed(_SIGNS[name])}>{_SIGNS[name]}</mo>", False
        if name in _LARGE:
            return f"<mo>{_LARGE[name]}</mo>", name != "int"
        if name in _FUNCTIONS:
            return f"<mi>{name}</mi>", name in ("max", "min", "sup", "inf", "lim")
        if name in _SPACES:
            return f'<mspace width="{_SPACES[name]}"/>', False
        if name in ("frac", "tfrac", "dfrac"):
            top, bottom = self.argument(), self.argument()
            style = ' displaystyle="false" scriptlevel="1"' if name == "tfrac" else ""
            return f"<mstyle{style}><mfrac>{top}{bottom}</mfrac></mstyle>", False
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>", False
        if name in _ACCENTS:
            return f'<mover accent="true">{self.argument()}<mo stretchy="false">{_ACCENTS[name]}</mo></mover>', False
        if name == "mathbb":
            letter = self.argument()
            return re.sub(r">(\w)<", lambda m: f">{_DOUBLE[m[1]]}<", letter), False
        if name in ("text", "mathrm"):
            return f"<mtext>{escape(self.words())}</mtext>", False
        if name == "operatorname":
            return f"<mi>{escape(self.words())}</mi>", False
        if name in _SIZES:
            side = self.take()
            sign = _SIGNS.get(side[1:], side) if side.startswith("\\") else side
            return ("" if sign == "." else f'<mo stretchy="false">{escape(sign)}</mo>'), False
        if name.startswith("begin{"):
            return self.table(name[6:-1]), False
        raise ValueError(f"docs/site/mathml.py does not know \\{name}, used in: {self.tex}")

    def table(self, kind: str) -> str:
        rows, cells = [], []
        while True:
            cells.append(f"<mtd>{self.row('&', chr(92) * 2, f'{chr(92)}end{{{kind}}}')}</mtd>")
            end = self.take()
            if end != "&":
                rows.append(f"<mtr>{''.join(cells)}</mtr>")
                cells = []
            if end.startswith("\\end"):
                break
        table = f'<mtable columnalign="left">{"".join(rows)}</mtable>'
        return f"<mrow><mo>{{</mo>{table}</mrow>" if kind == "cases" else table


def _fixed(sign: str) -> str:
    return ' stretchy="false"' if sign in "()[]|‖{}" else ""


def mathml(tex: str, display: bool) -> str:
    """The formula as a `<math>` element.

    Raises:
        ValueError: a command that is not known here, or a formula that does not end.
    """
    reader = _Reader(tex.strip())
    body = reader.row()
    if reader.peek():
        raise ValueError(f"a brace too many in: {tex}")
    kind = ' display="block"' if display else ""
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML"{kind}>{body}</math>'
