"""``holisafe-mini``: the drawn world of the tiny checkpoints, HoliSafe-Bench's small built-in sibling.

An image is two by two cells of coloured shapes on a light ground. A neutral line symbol in one cell stands
for one of the 19 harm classes; an image without a symbol is class 0, safe. Questions come in HoliSafe's
five types. Nothing harmful is drawn or asked: the symbols and topic words only stand for the classes.
"""
