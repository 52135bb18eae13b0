"""Everyday nouns for the classes of ImageNet-1k, which has 118 breeds of dog and no dog.

The numbers are those of the classes in the usual order (0 tench … 999 toilet tissue; Russakovsky et al., arXiv
1409.0575), which is a fact of that data set; which noun covers which classes is this project's choice. Things that
ImageNet has only as a part of others (person, knife, fork, wall, grass) are left out on purpose: a detector that
does not know them must not guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

CLASSES = 1000
LANDMARKS = {0: "tench", 207: "golden retriever", 281: "tabby", 546: "electric guitar", 999: "toilet tissue"}
"""Classes by which the usual order is recognised."""

_NOUNS = """
fish: 0-6 389-397
goldfish: 1
shark: 2-4
bird: 7-24 80-100 127-146
chicken, hen, rooster: 7 8
ostrich: 9
eagle: 22
vulture: 23
owl: 24
peacock: 84
parrot: 87-90
duck: 97 98
goose: 99
swan: 100
stork: 127 128
flamingo: 130
heron, egret: 131 132
pelican: 144
penguin: 145
salamander: 25-29
frog, toad: 30-32
turtle, tortoise: 33-37
lizard: 38-48
iguana: 39
crocodile, alligator: 49 50
dinosaur: 51
snake: 52-68
spider: 72-77
scorpion: 71
kangaroo, wallaby: 104
koala: 105
jellyfish: 107
coral: 109 973
shell: 112 117
snail: 113
crab: 118-121 125
lobster: 122 123
whale: 147 148
seal, sea lion: 150
dog, puppy, doggy, pup: 151-268
spaniel: 152 156 215-221
terrier: 158 179-193 199-203
retriever: 205-209
sheepdog, collie: 229-232
german shepherd, shepherd: 235
bulldog: 195 245
husky: 248-250
poodle: 265-267
wolf: 269-271
coyote: 272
hyena: 276
fox: 277-280
cat, kitten, kitty: 281-285
cougar, mountain lion: 286
leopard: 288 289
jaguar: 290
lion: 291
tiger: 292
cheetah: 293
bear: 294-297
polar bear: 296
mongoose, meerkat: 298 299
insect, bug: 300-320
beetle: 300-307
ladybug, ladybird: 301
fly: 308
bee: 309
ant: 310
grasshopper: 311
cricket: 312
dragonfly: 319
butterfly: 321-326
starfish: 327
rabbit, bunny: 330-332
hare: 331
hamster: 333
porcupine: 334
squirrel: 335
beaver: 337
guinea pig: 338
horse, pony: 339
zebra: 340
pig, hog, boar: 341-343
hippo, hippopotamus: 344
cow, bull, ox, cattle: 345
buffalo: 346 347
bison: 347
sheep, ram, lamb: 348 349
goat: 350
antelope, deer: 351-353
gazelle: 353
camel: 354
llama, alpaca: 355
otter: 360
skunk: 361
badger: 362
armadillo: 363
sloth: 364
monkey: 370-382
ape: 365-369
orangutan: 365
gorilla: 366
chimpanzee, chimp: 367
baboon: 372
elephant: 101 385 386
panda: 387 388
accordion: 401
guitar: 402 546
airplane, plane, jet, airliner, aeroplane, aircraft: 404 895
ambulance: 407
clock: 409 530 892
apron: 411
trash can, garbage can, bin, trash bin, dustbin: 412
rifle, gun: 413 763 764
backpack, rucksack, knapsack: 414
bakery: 415
balloon: 417
pen: 418 563
barn: 425
barrel: 427
wheelbarrow: 428
baseball: 429
basketball: 430
bathtub, tub, bath: 435 876
towel: 434 700
station wagon: 436
car, automobile: 436 468 511 609 627 656 661 751 817
lighthouse: 437
beaker: 438
bottle: 440 737 898 907
beer bottle: 440
beer glass, beer: 441
bib: 443
bicycle, bike, cycle: 444 671
bikini: 445
binoculars: 447
bookcase, bookshelf: 453
bookstore: 454
tie, bow tie: 457 906
necktie: 906
bow: 456
broom: 462
bucket, pail: 463
train, locomotive: 466 547 705 820
taxi, cab: 468
candle: 470
cannon: 471
canoe: 472
can opener: 473
carousel: 476
carton: 478
cash machine, atm: 480
castle: 483
catamaran: 484
cello: 486
cell phone, cellphone, mobile phone, smartphone: 487
phone, telephone: 487 528 707
chain: 488
chest: 492
church: 497
cleaver: 499
mug, coffee mug: 504
cup, teacup: 504 968
coffee pot: 505
lock, padlock: 507 695
keyboard, computer keyboard, keypad: 508 878
corkscrew: 512
cowboy hat: 515
crane: 134 517
helmet: 518 560
crate: 519
crib: 520
crock pot: 521
dam: 525
desk: 526
computer: 527 620 681
desktop computer, desktop: 527
diaper: 529
dining table, table, dinner table: 532 736
dishwasher: 534
dock: 536
drum: 541
dumbbell: 543
dutch oven: 544
fan: 545
envelope: 549
espresso maker, coffee maker: 550
filing cabinet: 553
fire engine, fire truck, firetruck: 555
flagpole: 557
flute: 558
chair: 423 559 765 857
folding chair: 559
rocking chair: 765
forklift: 561
fountain: 562
truck, lorry: 555 569 675 717 864 867
garbage truck: 569
frying pan, skillet, pan, wok: 567 909
gas pump: 571
goblet: 572
golf ball: 574
golf cart: 575
gondola: 576
piano: 579 881
greenhouse: 580
grocery store, supermarket: 582
hair dryer, hair drier, blow dryer: 589
hammer: 587
handkerchief: 591
harp: 594
hatchet, axe: 596
hourglass: 604
ipod: 605
iron: 606
pumpkin, jack-o'-lantern: 607
jeans, jean: 608
jeep: 609
puzzle: 611
joystick: 613
kimono: 614
ladle: 618
lamp: 619 846
lampshade: 619
laptop, laptop computer, notebook: 620 681
lawn mower: 621
library: 624
boat: 472 554 576 625 780 814 871 914
ship: 403 510 628 724
sailboat: 484 780 871 914
lighter: 626
limousine, limo: 627
lipstick: 629
loudspeaker, speaker: 632
mailbox: 637
mask: 643 796
matchstick: 644
maze: 646
measuring cup: 647
microphone: 650
microwave, microwave oven: 651
miniskirt, skirt: 655 689
minivan, van: 656 675 734
mitten: 658
bowl: 659 809
mixing bowl: 659
soup bowl: 809
moped, scooter, motor scooter: 665 670
motorcycle, motorbike: 665 670
monitor, screen, computer monitor, computer screen: 664 782
mosque: 668
tent: 672
mouse, computer mouse: 673
mousetrap: 674
nail: 677
necklace: 679
oboe: 683
organ: 687
oxcart: 690
paddle: 693
paintbrush: 696
palace: 698
paper towel: 700
parachute: 701
bench, park bench: 703
parking meter: 704
fence: 489 716 912
pickup truck, pickup: 717
pier: 718
piggy bank: 719
pillow: 721
pirate ship: 724
pitcher, jug: 725 899
plastic bag: 728
flowerpot, flower pot, pot, potted plant, potted plants: 738
drill: 740
rug: 741
printer: 742
projector: 745
puck: 746
purse, handbag: 748
mailbag: 636
quilt, comforter: 750
race car: 751
racket, racquet, tennis racket, tennis racquet: 752
radiator: 753
radio: 754
rv, motorhome: 757
camera: 732 759
refrigerator, fridge: 760
remote, remote control: 761
restaurant: 762
revolver: 763
rugby ball: 768
ruler: 769
running shoe, sneaker: 770
shoe: 502 514 630 770 774
boot: 514
sandal: 774
safe: 771
salt shaker: 773
saxophone: 776
scale: 778
bus: 654 779 874
school bus: 779
scoreboard: 781
screwdriver: 784
sewing machine: 786
shield: 787
shopping basket: 790
shopping cart: 791
shovel: 792
shower curtain: 794
ski: 795
sleeping bag: 797
sliding door: 799
snorkel: 801
snowmobile: 802
snowplow: 803
soap dispenser: 804
soccer ball: 805
ball: 429 430 574 722 768 805 852 890
sock: 806
sombrero: 808
space shuttle: 812
spatula: 813
speedboat: 814
spider web, web: 815
sports car: 817
spotlight: 818
stage: 819
bridge: 821 839 888
stethoscope: 823
stone wall: 825
stopwatch: 826
stove, oven, range: 827
streetcar, tram, trolley: 829
stretcher: 830
couch, sofa: 831
submarine: 833
suit: 834
sundial: 835
sunglasses: 836 837
sweatshirt: 841
swing: 843
switch: 844
syringe: 845
tank: 847
teapot: 849
teddy bear, teddy: 850
television, tv, tv set, television set: 851
tennis ball: 852
throne: 857
toaster: 859
toilet, toilet seat: 861
torch: 862
tow truck: 864
tractor: 866
semi truck, tractor trailer: 867
tray: 868
tricycle: 870
tripod: 872
trombone: 875
trumpet: 513
umbrella, parasol: 879
unicycle: 880
vacuum cleaner, vacuum: 882
vase: 883
vending machine: 886
violin: 889
volleyball: 890
waffle iron: 891
wallet: 893
wardrobe, closet: 894
sink, washbasin, wash basin: 896
washing machine, washer: 897
water bottle: 898
water tower: 900
whistle: 902
wig: 903
window shade: 905
wine bottle: 907
wooden spoon, spoon: 910
yurt: 915
website: 916
comic book: 917
crossword puzzle: 918
street sign, sign, stop sign: 919
traffic light, stoplight, traffic signal: 920
book jacket, book: 917 921
menu: 922
plate, dish: 923
guacamole: 924
soup: 925
ice cream: 928
popsicle, lollipop: 929
bread, loaf, baguette: 930
bagel: 931
pretzel: 932
burger, cheeseburger, hamburger: 933
hot dog, hotdog: 934
mashed potato: 935
cabbage: 936
broccoli: 937
cauliflower: 938
zucchini: 939
squash: 940-942
cucumber: 943
artichoke: 944
pepper, bell pepper: 945
mushroom: 947 992 996 997
apple, green apple: 948
strawberry: 949
orange: 950
lemon: 951
fig: 952
pineapple: 953
banana: 954
jackfruit: 955
pomegranate: 957
hay: 958
pasta, spaghetti: 959
dough: 961
meatloaf: 962
pizza: 963
pie: 964
burrito: 965
red wine, wine, wine glass, glass of wine: 966
espresso, coffee: 967
mountain: 970 980
bubble: 971
cliff: 972
reef: 973
geyser: 974
lake: 975
beach, seashore, shore, coast: 977 978
valley: 979
volcano: 980
baseball player: 981
groom, bridegroom: 982
scuba diver, diver: 983
daisy: 985
corn: 987
acorn: 988
toilet paper: 999
"""


def nouns() -> dict[str, frozenset[int]]:
    """The table: noun, in the singular, to numbers of classes."""
    table: dict[str, frozenset[int]] = {}
    for line in _NOUNS.strip().splitlines():
        names, _, numbers = line.partition(":")
        classes = frozenset(number for part in numbers.split() for number in _range(part))
        for name in names.split(","):
            table[name.strip()] = classes
    return table


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def is_imagenet_1k(names: Mapping[int, str]) -> bool:
    """Whether a classifier's classes, by their number, are those of ImageNet-1k in the usual order."""
    return len(names) == CLASSES and all(name in str(names.get(k, "")).lower() for k, name in LANDMARKS.items())


def nouns_of(names: Mapping[int, str]) -> dict[str, frozenset[int]]:
    """Nouns for a classifier's own class names.

    Args:
        names: Number of a class to its name; several may stand behind commas, as in "tench, Tinca tinca".

    Returns:
        Each name to its classes, and the last word of each name to all classes whose name ends with it ("cat" to
        "Persian cat" and "Siamese cat"). A whole name goes before a last word. Of ImageNet-1k, whose names' last
        words mislead ("carpenter's plane"), the whole names, and the table of this module before them.
    """
    whole: dict[str, set[int]] = {}
    last: dict[str, set[int]] = {}
    for number, text in names.items():
        for name in filter(None, (part.strip().lower().replace("_", " ") for part in text.split(","))):
            whole.setdefault(name, set()).add(number)
            last.setdefault(name.split()[-1], set()).add(number)
    own = {name: frozenset(numbers) for name, numbers in whole.items()}
    if is_imagenet_1k(names):
        return {**own, **nouns()}
    return {**{name: frozenset(numbers) for name, numbers in last.items()}, **own}


_IRREGULAR = {"mice": "mouse", "geese": "goose", "feet": "foot", "oxen": "ox", "calves": "calf", "buses": "bus"}


def singulars(noun: str) -> Iterable[str]:
    """What a noun may be the plural of, itself first; wrong guesses are in no vocabulary."""
    yield noun
    head, _, word = noun.rpartition(" ")
    before = f"{head} " if head else ""
    if word in _IRREGULAR:
        yield before + _IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            yield before + word[: -len(ending)] + instead


def classes_of(phrase: str, vocabulary: Mapping[str, frozenset[int]]) -> tuple[str, frozenset[int]] | None:
    """Which classes a phrase names: those of the longest run of its last words that the vocabulary has.

    Args:
        phrase: "two brown hot dogs".
        vocabulary: From `nouns` or `nouns_of`.

    Returns:
        The noun ("hot dog") and its classes, or None: the classifier does not know what the phrase speaks of.
    """
    words = phrase.lower().split()
    for start in range(len(words)):
        for noun in singulars(" ".join(words[start:])):
            if noun in vocabulary:
                return noun, vocabulary[noun]
    return None
