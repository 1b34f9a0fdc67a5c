"""Shapes of single matrices that most tests run on."""

TALL, WIDE, SQUARE, ODD, ROW, COLUMN = (24, 10), (10, 24), (16, 16), (17, 5), (1, 7), (9, 1)
SHAPES = [TALL, WIDE, SQUARE, ODD, ROW, COLUMN]
