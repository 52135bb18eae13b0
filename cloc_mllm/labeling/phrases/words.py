"""Words that name nothing one could draw a box around, and function words.

The paper says that about 40 generic words are dropped and that phrases of stop words alone are, and lists neither.
Both lists are ours.
"""

from __future__ import annotations


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


GENERIC_WORDS = _words(
    # The picture itself.
    "image images picture pictures photo photos photograph photographs pic pics photography snapshot shot shots",
    "illustration illustrations drawing thumbnail wallpaper wallpapers close-up closeup",
    # What is seen as a whole, and where in it.
    "view views scene scenes background backgrounds foreground middle center centre corner side sides top bottom",
    "front back left right distance area areas part parts",
    # Amounts.
    "group groups bunch couple pair lot lots variety number type types kind kinds",
    # What alt texts say of files and sales.
    "jpg jpeg png gif hd download downloads royalty free stock vector vectors www http https com sale",
)
"""Dropped before tagging: some 50 words, 76 with plurals and spellings."""

STOP_WORDS = _words(
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "an the this that these those some any each every either neither no none all both half such another other others",
    "one ones much many more most few fewer less least several own same enough",
    "me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers",
    "herself it its itself they them their theirs themselves who whom whose which what whatever whoever",
    "anyone anybody anything someone somebody something everyone everybody everything nobody nothing",
    "and or but nor so yet if then else than because while although though unless until whether",
    "of in on at by for with without about against between among into onto through during before after above below to",
    "from up down out off over under again further near close next beside besides behind across along around toward",
    "towards inside outside within upon via per like as",
    "here there where when why how now today ever never always often also only just very too quite rather really not",
    "n't 's 're 've 'll 'd 'm be is are was were been being am do does did doing done have has had having",
    "can could will would shall should may might must ought let get gets got",
    "thing things stuff way ways etc",
)
"""A phrase of nothing but these is dropped."""

DETERMINERS = _words("a an the this that these those some any each every another no all both either neither")
"""Left out of account when two phrases are compared: "a dog" and "the dog" are one."""

NEGATIONS = _words("no neither")
"""A phrase that begins with one of these speaks of what is not there, and is dropped."""
