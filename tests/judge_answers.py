"""Answers of judges as they come: which are a rating, and which are none."""

RATED = {
    "1": 1, "2": 2, "3": 3, "4": 4, "5": 5, "6": 6, "7": 7, "8": 8, "9": 9, "10": 10,
    " 7": 7, "7 ": 7, "7\n": 7, "\n\n7\n": 7, "\t10\t": 10, "7\r\n": 7, "   1   ": 1,
    "1.0": 1, "7.0": 7, "10.0": 10, "10.00": 10, "7.5": 7.5, "1.5": 1.5, "9.9": 9.9, "8.25": 8.25,
    "3.14159": 3.14159, "9.999999999": 9.999999999, "2.000": 2, "6.5\n": 6.5, " 4.75 ": 4.75,
}  # fmt: skip

OUT_OF_RANGE = [
    "0", "11", "12", "100", "0.5", "0.99", "10.1", "10.5", "10.000001", "10.0000000000001", "-1",
    "-7", "−7", "-0", "00", "1000000", "7" * 400, "99", "20", "0.0", "010", "07", "007", "01.5",
    "1" + "0" * 50,
]  # fmt: skip

NOT_QUITE_A_NUMBER = [
    "+7", "7.", ".7", "7,5", "7,0", "7..5", "7.5.1", "1e1", "1E0", "7e0", "0x7", "0b111", "7f",
    "7L", "7_0", "1_0", "seven", "Seven", "VII", "vii", "7th", "7!", "7?", "7%", "70%", "7°", "#7",
    "№7", "7*", "~7", "≈7", ">7", "<7", "=7", "7;", "7:", "(7)", "[7]", "{7}", "'7'", '"7"', "`7`",
    "«7»", "“7”", "*7*", "**7**", "_7_", "<7>", "7\\", "/7", "$7$", "\\boxed{7}", "7 7", "7\n7",
    "7 8", "7-8", "7–8", "7 to 8", "7 or 8", "1 0", "1\n0", "1.\n0", "7\x00", "\x007", "7\u200b",
    "\ufeff7", "7\u00a0", "\u30007", "7\u2009", "7\x0b", "7\x0c", "7\x1c", "7\u2028", "- 7", "7 -",
]  # fmt: skip

SLASHES = [
    "7/10", "7 / 10", "10/10", "7 out of 10", "7 of 10", "7/10.", "Score: 7/10", "7⁄10", "7|10",
    "7 von 10", "7 из 10", "7 sur 10", "10点中7点", "10점 만점에 7점",
]  # fmt: skip

OTHER_DIGITS = [
    "７", "１０", "٧", "۷", "७", "৭", "௭", "๗", "໗", "七", "七点", "十", "칠", "⑦", "❼", "⁷", "₇",
    "Ⅶ", "𝟕", "𝟩", "7️⃣", "٧.٥", "1０", "１0", "½", "7½", "壱拾",
]  # fmt: skip

NAMES_OF_NUMBERS = [
    "nan", "NaN", "NAN", "-nan", "inf", "Infinity", "-Infinity", "null", "None", "undefined",
    "true", "N/A", "n/a", "NA", "-", "—", "?", "...", "…",
]  # fmt: skip

JSON = [
    '{"score": 7}', '{"rating": 7}', "```json\n{\"score\": 7}\n```", "```\n7\n```", "```7```",
    "[7]", '"7"', '{"score": "7"}', '{"score": null}', '{"score": NaN}', "{}", "[]", '{"score": 7',
    '{"score":', "{'score': 7}", "<score>7</score>", "<rating>7", "score=7", "score: 7",
    "```json\n{\"criterion\": \"French\", \"score\": 7, \"reason\": \"ok\"}\n```", "|7|",
    "- 7\n- 8",
]  # fmt: skip

PROSE = [
    "Score: 7", "Rating: 7", "The rating is 7.", "I would give this a 7.", "7 - mostly French",
    "7. The text is in French.", "7\n\nThe text is fluent.", "Answer: 7", "My answer is: 10",
    "On a scale from 1 to 10, 7.", "It is between 6 and 7.", "About seven.", "Sure! 7",
    "<think>It is French.</think>\n7", "<think>maybe 7", "7 (seven)", "7 points", "7 stars", "★★★★",
    "**Rating:** 7", "# 7", "> 7", "Оценка: 7", "評価：7", "평가: 7", "Note : 7", "Bewertung: 7",
    "The text scores 0.", "Not applicable to this text, so 1.", "7 for French and 3 for fluency",
    "__import__('os').system('echo 7')", "3+4", "7*1", "int('7')", "max(7, 1)", "2**3",
    "len('abc')",
]  # fmt: skip

REFUSALS = [
    "I'm sorry, but I can't rate this text.", "I cannot help with that.", "I can't assist.",
    "As an AI language model, I cannot judge.", "Je ne peux pas évaluer ce texte.",
    "Я не могу это оценить.", "申し訳ありませんが、評価できません。",
    "죄송하지만 평가할 수 없습니다.",
    "This content violates our policies.", "The text is empty.",
]  # fmt: skip

EMPTY = ["", " ", "\n", "\t", "\r\n\r\n", "\x00", "\u200b", "\ufeff"]

UNPARSED = [
    *OUT_OF_RANGE, *NOT_QUITE_A_NUMBER, *SLASHES, *OTHER_DIGITS, *NAMES_OF_NUMBERS, *JSON, *PROSE,
    *REFUSALS, *EMPTY,
]  # fmt: skip

TRUNCATED = ["1", "7", "7.", "7.5", "10", "", "The text", "<think>", '{"score": 7', "1.0"]
"""What a model wrote up to the longest answer that is allowed: a 1 may be the beginning of a 10."""
