"""Other ways to say a caption, so that a model trained on the people world follows free prompts as well."""

from __future__ import annotations

import re

_CAPTION = re.compile(
    r"(?P<frame>an? [a-z -]*?(?:photo|portrait)) of (?P<person>an? (?P<adjectives>[a-z ]*?)(?P<noun>man|woman)"
    r"(?P<hair> with [a-z ]+? hair)?)(?: wearing (?P<clothes>[^,]+))?, (?P<action>[^,]+)(?:, (?P<rest>.+))?"
)
FULL_SHARE = 4  # of a caption's forms, how many are the caption itself


def paraphrases(caption: str) -> tuple[str, ...]:
    """The caption, FULL_SHARE times, and shorter forms that say less: no framing, no looks, "in" for "wearing".

    One drawn uniformly is the caption itself at least every other time. Raises: ValueError on text of another grammar.
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(f"not a caption of the people world: {caption!r}")
    part = match.groupdict(default="")
    background = part["rest"].rpartition(", ")[2]
    plain = f"a {part['noun']}"
    dressed = f"{plain} in {part['clothes']}" if part["clothes"] else plain
    worn = f" wearing {part['clothes']}" if part["clothes"] else ""
    forms = (
        f"{part['person']}{worn}, {part['action']}, {part['rest']}",
        f"{dressed} {part['action']}",
        f"{part['frame']} of {dressed}, {background}",
        f"{part['person']}, {part['action']}, {background}",
    )
    return (caption,) * FULL_SHARE + forms
