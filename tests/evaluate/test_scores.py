"""The rules of scores: answers as models write them, in Chinese and English, and properties of each rule."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpangu_sft.evaluate.scores import RULES, choice, contains, exact, normalised


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("北京", "北京。"),
        ("北京", " “北京”！\n"),
        ("《红楼梦》", "红楼梦"),
        ("Paris", "**PARIS.**"),
        ("new york", "New\n  York"),
        ("Straße", "STRASSE"),
        ("50%", "５０％。"),
        ("-5", "−5."),
        ("1,234,500", "1234500"),
        ("GPU", "ＧＰＵ"),
    ],
)
def test_exact_ignores_how_it_is_written(expected: str, answer: str) -> None:
    assert exact(expected, answer)


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("北京", "答案是北京"),
        ("-5", "5"),
        (".5", "5"),
        ("50%", "50"),
        ("$50", "50"),
        ("C#", "C"),
        ("C++", "C"),
        ("12", "12.0"),
        ("1,23", "123"),
        ("", ""),
        ("。", "。"),
    ],
)
def test_exact_keeps_what_is_part_of_a_value(expected: str, answer: str) -> None:
    assert not exact(expected, answer)


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("九点", "云雾茶社每天早上九点开门，晚上九点半打烊。"),
        ("北京", "中国的首都是**北京**。"),
        ("12", "一共有12个苹果。"),
        ("12", "So the total is 12."),
        ("12", "净重12kg，约 26 磅"),
        ("12", "日期：2024-12-01"),
        ("12", "１２"),
        ("1200", "共 1,200 元"),
        ("1,200", "It costs $1200."),
        ("200", "分别是100，200，300"),
        ("-5", "所以 x = −5。"),
        ("0.5", "约0.5米"),
        ("cat", "It is a Cat!"),
        ("Paris", "1.Paris\n2.Lyon"),
        ("HTTP", "使用HTTP协议"),
        ("C", "C++"),
        ("n/a", "N/A"),
    ],
)
def test_contains(expected: str, answer: str) -> None:
    assert contains(expected, answer)


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("北京", "南京"),
        ("12", "112"),
        ("12", "120"),
        ("12", "1.12"),
        ("12", "12.5"),
        ("12", "-12"),
        ("12", "x=−12"),
        ("12", "12,000"),
        ("12", "B12"),
        ("200", "1,200"),
        ("5", "0.5"),
        ("-5", "10-5"),
        ("cat", "concatenate"),
        ("cat", "cats"),
        ("is", "this"),
        ("id", "user_id"),
        ("九 点", "九点"),
        ("", "everything"),
        ("！", "好！"),
    ],
)
def test_contains_no_part_of_a_word_or_a_number(expected: str, answer: str) -> None:
    assert not contains(expected, answer)


@pytest.mark.parametrize(
    "answer",
    [
        *["B", "b", "B.", "（B）", "Ｂ", "**B**", "[B]", "B. 北京", "B、北京", "B\n\n因为……"],
        *[
            "答案：B",
            "答案是B",
            "正确答案是 B。",
            "答案为：**B**",
            "【答案】B",
            "【答案】 B\n【解析】A选项不对",
            "答案应该是（B）",
        ],
        *["故选：B。", "应选（B）", "我的选择是B", "因此选择选项B", "选B，A错误", "选B，不选A", "不应选A，选B"],
        "答案是 A 吗？再算一遍，应该选 B。",
        "选项A错误，选项B正确，所以答案选B",
        "答案是B。选项A错误，选项C也错误。",
        "正确的选项为 B。A、C、D 不对",
        "A. 上海\nB. 北京\nC. 广州\n答案：B",
        *["答案是 \\boxed{B}", "$$\\boxed{\\text{B}}$$", "The answer is:\n\n$$\n\\boxed{\\text{B}}\n$$"],
        *["The answer is (B).", "The correct answer is **B**: Paris", "Answer: B", "ANSWER - B", "I choose option B"],
        *["I think it's B.", "The answer should be Option B", "A dog barks, so B.", "The correct option is B"],
        "Let me see: A says 3, B says 4. Answer: B",
        "The answer is B and I'm sure.",
        "答案不是A，而是B。",
    ],
)
def test_an_answer_decides_for_b(answer: str) -> None:
    assert choice("B", answer)
    assert not choice("A", answer)


@pytest.mark.parametrize(
    "answer",
    [
        *["", "A", "北京", "Banana", "12", "不知道", "BB", "a b"],
        *[
            "答案：A",
            "答案是A，而不是B",
            "答案是A，因为它不是脂肪而是B类",
            "选项B错误，答案是A",
            "The answer is A, not B",
            "\\boxed{A}, not B",
        ],
    ],
)
def test_an_answer_does_not_decide_for_b(answer: str) -> None:
    assert not choice("B", answer)


@pytest.mark.parametrize(
    "answer",
    [
        "A和B",
        "答案是A和B",
        "选A、B",
        "选A、B、D。",
        "选AB",
        "A 或 B",
        "A、B、C 都有可能",
        "The answer is A or B",
        "选 A, B.",
    ],
)
def test_several_letters_decide_for_none(answer: str) -> None:
    assert not any(choice(letter, answer) for letter in "ABCD")


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("A", "A dog.", False),
        ("A", "A is correct", True),
        ("A", "The answer is A because the sky is blue", True),
        ("I", "I think so", False),
        ("I", "I", True),
        ("（b）", "B", True),
        ("dog", "dog", False),
        ("AB", "AB", False),
        ("", "", True),
    ],
)
def test_articles_pronouns_and_what_is_no_letter(expected: str, answer: str, right: bool) -> None:
    assert choice(expected, answer) is right


letters = st.sampled_from("ABCDEFGH")
ends = st.text("。！？，、；：“”「」《》（）.,!?;:\"'*` \n\u3000", max_size=4)
words = st.text(st.characters(categories=["Lu", "Ll", "Nd", "Lo"]), min_size=1, max_size=8)


@given(st.sampled_from(sorted(RULES)), st.text(max_size=20), st.text(max_size=40))
def test_every_rule_answers_to_any_texts(rule: str, expected: str, answer: str) -> None:
    assert RULES[rule](expected, answer) in (True, False)  # type: ignore[index]


@given(words, ends, ends)
def test_punctuation_width_and_case_change_nothing(word: str, before: str, after: str) -> None:
    written = before.replace(".", "") + unicodedata.normalize("NFKC", word) + after  # .5 is not 5
    assert normalised(written) == normalised(word)
    assert exact(word, written)
    assert contains(word, written)


@given(st.text(max_size=10), st.text(max_size=10))
def test_what_is_exact_is_contained(expected: str, answer: str) -> None:
    assert exact(expected, expected) == contains(expected, expected) == bool(normalised(expected))
    if exact(expected, answer):
        assert contains(expected, answer)


@given(st.integers(-99999, 99999), st.lists(st.integers(-99999, 99999), max_size=4), st.sampled_from("，。； \n个和"))
def test_a_number_is_contained_where_it_is_one_of_the_numbers(wanted: int, said: list[int], between: str) -> None:
    for form in ("{}", "{:,}"):
        answer = between.join(map(form.format, said))
        assert contains(str(wanted), answer) == (wanted in said)


@given(st.from_regex("[a-z]{1,4}", fullmatch=True), st.text("ab c,.-茶", max_size=12))
def test_an_ascii_word_is_contained_where_it_is_one_of_the_words(wanted: str, answer: str) -> None:
    assert contains(wanted, answer) == (wanted in re.findall("[a-z]+", answer))


@given(
    letters,
    letters,
    st.sampled_from(["答案：{}", "所以选{}。", "The answer is {}", "\\boxed{{{}}}", "正确选项为（{}）"]),
)
def test_the_last_letter_after_a_mark_decides(first: str, last: str, form: str) -> None:
    reply = f"先看 {first}：答案是{first}？不对。{form.format(last)}"
    assert [letter for letter in "ABCDEFGH" if choice(letter, reply)] == [last]
