"""Judges answers by their length and variety; ``sweep.yaml`` calls it on the mesh."""


def judge(rows, temperature):
    """Return one row per answer: its length in words, and the share of words that stand in it once."""
    judged = []
    for row in rows:
        words = row["completion"].lower().split()
        distinct = len(set(words)) / len(words) if words else 0.0
        judged.append({"temperature": temperature, "words": len(words), "distinct_share": distinct})
    return judged
