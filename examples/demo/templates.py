# SPDX-License-Identifier: Apache-2.0
"""Phrasings of the demo's arithmetic word problems.

A *kind* is one sort of problem: a way to draw its numbers, one fixed style of
worked answer, and several phrasings of the question.  The worked answer follows
from the kind and the drawn values alone, so that a model can become sure of it.
The phrasings under ``held_out`` are never trained on: evaluation uses only those.

Placeholders: ``{n}`` and ``{m}`` are two different names, ``{o}`` is an object in
the plural, ``{a}`` .. ``{d}`` are the numbers of the kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Numbers = dict[str, int]

_NAMES = """
Ada Ben Carla Dan Eva Finn Gina Hugo Ida Jack Kira Leo Mia Nora Omar Pia Rosa Sam Tara
Uma Vera Will Yara Zoe Alan Bella Chen Dora Emil Fatima Greg Hana Ivan Jana Karl Lena
Max Nina Oscar Paul
"""
_OBJECTS = """
apples pears plums books pens coins cards shells stamps marbles cookies eggs flowers
stickers buttons beads balls kites cups nuts stones candles ribbons tickets toys keys
lemons carrots rings maps
"""
NAMES = tuple(_NAMES.split())
OBJECTS = tuple(_OBJECTS.split())


@dataclass(frozen=True)
class Kind:
    """One kind of problem.

    Attributes:
        name: Short identifier, unique.
        draw: Draws the numbers, including every intermediate result.
        steps: Lines of the worked answer, with placeholders.
        answer: Name of the number that is the answer.
        unit: Text after the answer, with placeholders; may be empty.
        train: Phrasings used for training.
        held_out: Phrasings used for evaluation only.
    """

    name: str
    draw: Callable[[Random], Numbers]
    steps: tuple[str, ...]
    answer: str
    unit: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _gain(rng: Random) -> Numbers:
    a, b = rng.randint(2, 49), rng.randint(2, 30)
    return {"a": a, "b": b, "r": a + b}


def _loss(rng: Random) -> Numbers:
    b, r = rng.randint(2, 30), rng.randint(2, 49)
    return {"a": b + r, "b": b, "r": r}


def _groups(rng: Random) -> Numbers:
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    return {"a": a, "b": b, "r": a * b}


def _share(rng: Random) -> Numbers:
    b, r = rng.randint(2, 9), rng.randint(2, 12)
    return {"a": b * r, "b": b, "r": r}


def _gain_loss(rng: Random) -> Numbers:
    a, b = rng.randint(5, 40), rng.randint(2, 20)
    c = rng.randint(2, min(20, a + b - 1))
    return {"a": a, "b": b, "c": c, "p": a + b, "r": a + b - c}


def _groups_gain(rng: Random) -> Numbers:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 20)
    return {"a": a, "b": b, "c": c, "p": a * b, "r": a * b + c}


def _groups_loss(rng: Random) -> Numbers:
    a, b = rng.randint(2, 9), rng.randint(3, 9)
    c = rng.randint(2, a * b - 2)
    return {"a": a, "b": b, "c": c, "p": a * b, "r": a * b - c}


def _change(rng: Random) -> Numbers:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    c = rng.choice([bill for bill in (20, 50, 100) if bill > a * b])
    return {"a": a, "b": b, "c": c, "p": a * b, "r": c - a * b}


def _unit_price(rng: Random) -> Numbers:
    a, p, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    return {"a": a, "b": a * p, "c": c, "p": p, "r": p * c}


def _three(rng: Random) -> Numbers:
    a, b, c = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 20)
    return {"a": a, "b": b, "c": c, "p": a + b, "r": a + b + c}


KINDS: tuple[Kind, ...] = (
    Kind(
        name="gain",
        draw=_gain,
        steps=(
            "{n} has {a} {o} at first.",
            "{n} gets {b} more {o}.",
            "We add: {a} + {b} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} has {a} {o}. {m} gives {n} {b} more {o}. "
            "How many {o} does {n} have now?",
            "{n} had {a} {o} and then found {b} more. How many {o} does {n} have?",
            "There are {a} {o} in the box of {n}. {n} puts {b} more {o} into it. "
            "How many {o} are in the box now?",
            "{n} owns {a} {o}. On Monday {n} buys {b} more. "
            "How many {o} does {n} own after that?",
            "After a trip {n}, who already had {a} {o}, brings home {b} new ones. "
            "How many {o} are there now?",
        ),
        held_out=(
            "{n} had {a} {o}. Then {m} gave {n} {b} more. "
            "How many {o} does {n} have after that?",
        ),
    ),
    Kind(
        name="loss",
        draw=_loss,
        steps=(
            "{n} has {a} {o} at first.",
            "{n} loses {b} {o}.",
            "We subtract: {a} - {b} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} has {a} {o}. {n} gives {b} of them to {m}. "
            "How many {o} does {n} have left?",
            "{n} had {a} {o} but lost {b} of them. How many {o} are left?",
            "There are {a} {o} in the box of {n}. {n} takes {b} {o} out. "
            "How many {o} are still in the box?",
            "{n} owns {a} {o}. On Friday {n} sells {b} of them. "
            "How many {o} does {n} still own?",
            "Of the {a} {o} that {n} had, {b} are now broken. "
            "How many good {o} remain?",
        ),
        held_out=(
            "{n} had {a} {o}. Then {n} gave {b} of them to {m}. "
            "How many {o} are still with {n}?",
        ),
    ),
    Kind(
        name="groups",
        draw=_groups,
        steps=(
            "There are {a} groups.",
            "Each group has {b} {o}.",
            "We multiply: {a} x {b} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} has {a} bags. Each bag holds {b} {o}. "
            "How many {o} does {n} have in all?",
            "{n} fills {a} boxes with {b} {o} each. How many {o} is that in all?",
            "There are {a} shelves with {b} {o} on each shelf. "
            "How many {o} are there in all?",
            "Each of {a} friends brings {b} {o} to {n}. "
            "How many {o} do they bring together?",
            "{n} makes {a} rows of {b} {o}. How many {o} does {n} need?",
        ),
        held_out=(
            "There are {a} boxes in the room of {n}. Each box holds {b} {o}. "
            "How many {o} are there in all?",
        ),
    ),
    Kind(
        name="share",
        draw=_share,
        steps=(
            "There are {a} {o} in all.",
            "They go into {b} equal parts.",
            "We divide: {a} / {b} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} shares {a} {o} equally among {b} friends. "
            "How many {o} does each friend get?",
            "{n} puts {a} {o} into {b} boxes, the same number in each. "
            "How many {o} are in one box?",
            "{a} {o} are divided equally among {b} children. "
            "How many {o} does each child get?",
            "{n} and the others are {b} people and split {a} {o} equally. "
            "How many {o} are there for each?",
            "{n} lays {a} {o} in {b} equal rows. How many {o} are in each row?",
        ),
        held_out=(
            "{a} {o} are split equally among {b} friends of {n}. "
            "How many {o} does each friend get?",
        ),
    ),
    Kind(
        name="compare",
        draw=_loss,
        steps=(
            "{n} has {a} {o}.",
            "{m} has {b} {o}.",
            "We compare: {a} - {b} = {r}.",
        ),
        answer="r",
        unit=" {o} more",
        train=(
            "{n} has {a} {o} and {m} has {b} {o}. "
            "How many more {o} does {n} have than {m}?",
            "{n} counts {a} {o}. {m} counts only {b} {o}. "
            "How many more {o} did {n} count?",
            "{n} picked {a} {o}, while {m} picked {b}. "
            "By how many {o} is {n} ahead of {m}?",
            "In the bag of {n} are {a} {o}, in the bag of {m} are {b} {o}. "
            "How many more {o} does {n} have?",
        ),
        held_out=(
            "{n} owns {a} {o}, while {m} has only {b} {o}. "
            "How many more {o} does {n} have than {m}?",
        ),
    ),
    Kind(
        name="together",
        draw=_gain,
        steps=(
            "{n} has {a} {o}.",
            "{m} has {b} {o}.",
            "Together: {a} + {b} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} has {a} {o} and {m} has {b} {o}. How many {o} do they have together?",
            "{n} counts {a} {o} and {m} counts {b}. "
            "How many {o} do the two of them count together?",
            "{n} picked {a} {o}, {m} picked {b} {o}. "
            "How many {o} did both of them pick in all?",
            "In the bag of {n} are {a} {o}, in the bag of {m} are {b} {o}. "
            "How many {o} are in both bags together?",
        ),
        held_out=(
            "{n} owns {a} {o} and {m} owns {b} {o}. "
            "How many {o} do both of them have together?",
        ),
    ),
    Kind(
        name="gain_loss",
        draw=_gain_loss,
        steps=(
            "{n} has {a} {o} at first.",
            "{n} gets {b} more {o}.",
            "We add: {a} + {b} = {p}.",
            "{n} loses {c} {o}.",
            "We subtract: {p} - {c} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} has {a} {o}. {n} finds {b} more and then gives {c} to {m}. "
            "How many {o} does {n} have now?",
            "{n} had {a} {o}. {m} gave {n} {b} more {o}, but later {n} lost {c}. "
            "How many {o} are left?",
            "{n} owns {a} {o}. On Monday {n} buys {b} more, on Friday {n} sells {c}. "
            "How many {o} does {n} still own?",
            "There are {a} {o} in the box of {n}. {n} puts in {b} more and takes "
            "{c} out. How many {o} are in the box now?",
        ),
        held_out=(
            "{n} had {a} {o}. Then {n} bought {b} more {o} and gave {c} to {m}. "
            "How many {o} does {n} still have?",
        ),
    ),
    Kind(
        name="groups_gain",
        draw=_groups_gain,
        steps=(
            "There are {a} groups.",
            "Each group has {b} {o}.",
            "We multiply: {a} x {b} = {p}.",
            "{n} gets {c} more {o}.",
            "We add: {p} + {c} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} has {a} bags with {b} {o} each and gets {c} more {o}. "
            "How many {o} does {n} have in all?",
            "{n} fills {a} boxes with {b} {o} each. Then {m} brings {c} more {o}. "
            "How many {o} are there in all?",
            "There are {a} shelves with {b} {o} on each. {n} adds {c} more {o}. "
            "How many {o} are there now?",
            "{n} makes {a} rows of {b} {o} and finds {c} more. "
            "How many {o} is that in all?",
        ),
        held_out=(
            "{n} has {a} boxes with {b} {o} in each box. {m} gives {n} {c} more {o}. "
            "How many {o} does {n} have now?",
        ),
    ),
    Kind(
        name="groups_loss",
        draw=_groups_loss,
        steps=(
            "There are {a} groups.",
            "Each group has {b} {o}.",
            "We multiply: {a} x {b} = {p}.",
            "{n} loses {c} {o}.",
            "We subtract: {p} - {c} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} has {a} bags with {b} {o} each and gives {c} {o} to {m}. "
            "How many {o} does {n} have left?",
            "{n} fills {a} boxes with {b} {o} each. Then {n} sells {c} {o}. "
            "How many {o} are left?",
            "There are {a} shelves with {b} {o} on each. {n} takes {c} {o} away. "
            "How many {o} remain?",
            "{n} makes {a} rows of {b} {o} and then loses {c} of them. "
            "How many {o} are left?",
        ),
        held_out=(
            "{n} has {a} boxes with {b} {o} in each box. {n} sells {c} of the {o}. "
            "How many {o} does {n} still have?",
        ),
    ),
    Kind(
        name="cost",
        draw=_groups,
        steps=(
            "{n} buys {a} {o}.",
            "Each one costs {b} dollars.",
            "We multiply: {a} x {b} = {r}.",
        ),
        answer="r",
        unit=" dollars",
        train=(
            "{n} buys {a} {o} for {b} dollars each. How much does {n} pay?",
            "One of the {o} costs {b} dollars. {n} buys {a} of them. "
            "How many dollars does {n} pay?",
            "At the shop {n} takes {a} {o}. Each costs {b} dollars. "
            "What is the price in all?",
            "{n} wants {a} {o} and each of them costs {b} dollars. "
            "How many dollars does {n} need?",
        ),
        held_out=(
            "{n} takes {a} {o} at the shop, and each one costs {b} dollars. "
            "How much does {n} pay?",
        ),
    ),
    Kind(
        name="change",
        draw=_change,
        steps=(
            "{n} buys {a} {o}.",
            "Each one costs {b} dollars.",
            "We multiply: {a} x {b} = {p}.",
            "{n} pays with {c} dollars.",
            "We subtract: {c} - {p} = {r}.",
        ),
        answer="r",
        unit=" dollars",
        train=(
            "{n} buys {a} {o} for {b} dollars each and pays with a {c} dollar note. "
            "How much change does {n} get?",
            "One of the {o} costs {b} dollars. {n} has {c} dollars and buys {a} of "
            "them. How many dollars are left?",
            "At the shop {n} takes {a} {o}. Each costs {b} dollars. {n} hands over "
            "{c} dollars. How many dollars come back?",
            "{n} has {c} dollars, buys {a} {o} and pays {b} dollars for each. "
            "How many dollars does {n} have left?",
        ),
        held_out=(
            "{n} takes {a} {o} at the shop for {b} dollars each and hands over a "
            "{c} dollar note. How much change does {n} get?",
        ),
    ),
    Kind(
        name="unit_price",
        draw=_unit_price,
        steps=(
            "{a} {o} cost {b} dollars.",
            "We divide: {b} / {a} = {p}.",
            "{n} buys {c} {o}.",
            "We multiply: {p} x {c} = {r}.",
        ),
        answer="r",
        unit=" dollars",
        train=(
            "{a} {o} cost {b} dollars. How much does {n} pay for {c} {o}?",
            "{m} pays {b} dollars for {a} {o}. "
            "How many dollars does {n} pay for {c} {o}?",
            "At the shop {a} {o} cost {b} dollars. {n} wants {c} of them. "
            "What is the price of {c} {o}?",
            "The price of {a} {o} is {b} dollars. {n} needs {c} {o}. "
            "How many dollars does {n} need?",
        ),
        held_out=(
            "At the market {m} pays {b} dollars for {a} {o}. {n} wants {c} {o}. "
            "How much does {n} pay?",
        ),
    ),
    Kind(
        name="duration",
        draw=_groups,
        steps=(
            "{n} does this on {a} days.",
            "Each day takes {b} minutes.",
            "We multiply: {a} x {b} = {r}.",
        ),
        answer="r",
        unit=" minutes",
        train=(
            "{n} reads for {b} minutes a day. How many minutes is that in {a} days?",
            "Every day {n} runs for {b} minutes. "
            "How many minutes does {n} run in {a} days?",
            "{n} plays music on {a} days for {b} minutes each day. "
            "How many minutes is that in all?",
            "For {a} days {n} draws for {b} minutes a day. "
            "How many minutes does {n} draw in all?",
        ),
        held_out=(
            "For {a} days {n} reads for {b} minutes each day. "
            "How many minutes does {n} read in all?",
        ),
    ),
    Kind(
        name="time_left",
        draw=_loss,
        steps=(
            "The whole time is {a} minutes.",
            "{b} minutes are over.",
            "We subtract: {a} - {b} = {r}.",
        ),
        answer="r",
        unit=" minutes",
        train=(
            "The lesson of {n} takes {a} minutes. {b} minutes are over. "
            "How many minutes are left?",
            "{n} wants to run for {a} minutes and has run for {b} minutes. "
            "How many minutes are left?",
            "A film takes {a} minutes. {n} has seen {b} minutes of it. "
            "How many minutes remain?",
            "The way to school takes {n} {a} minutes. {n} has walked for {b} "
            "minutes. How many more minutes are needed?",
        ),
        held_out=(
            "{n} wants to read for {a} minutes and has read for {b} minutes. "
            "How many minutes remain?",
        ),
    ),
    Kind(
        name="three",
        draw=_three,
        steps=(
            "On day 1 {n} sees {a} {o}.",
            "On day 2 {n} sees {b} {o}.",
            "On day 3 {n} sees {c} {o}.",
            "We add: {a} + {b} = {p}.",
            "We add: {p} + {c} = {r}.",
        ),
        answer="r",
        unit=" {o}",
        train=(
            "{n} counts {a} {o} on Monday, {b} on Tuesday and {c} on Friday. "
            "How many {o} is that in all?",
            "On three days {n} finds {a}, {b} and {c} {o}. "
            "How many {o} does {n} find in all?",
            "{n} sells {a} {o} on the first day, {b} {o} on the second day and "
            "{c} {o} on the third. How many {o} does {n} sell in all?",
            "{n} picks {a} {o} on Monday. On Tuesday it is {b} {o} and on Friday "
            "{c} {o}. How many {o} does {n} pick in all?",
        ),
        held_out=(
            "{n} sells {a} {o} on Monday, {b} {o} on Tuesday and {c} {o} on Friday. "
            "How many {o} does {n} sell in all?",
        ),
    ),
)
