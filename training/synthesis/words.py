"""What is written: words, random strings and sentences in English and Chinese, split into training and evaluation.

A text belongs to the evaluation by a hash of its case-folded form, so the split needs no list and never changes.
Single characters are always trained on: they are what a held-out word is made of.
"""

from __future__ import annotations

import functools
import hashlib
import random
import string
from dataclasses import dataclass

SPLITS = ("train", "held_out")
_ENGLISH = """
a able about above across action after again age ago air alarm all alone also amber and angle animal answer apple
april arch arm army arrow art ask atlas aunt autumn away baby back bag bake ball bamboo band bank bar barn base basket
bath bay beach bean bear beauty bed bee before bell below best big bike bird black blue board boat body bold book
border bottle bowl box boy brain branch brave bread break brick bridge bright brown brush build bus busy butter button
cafe cake call camera camp candle captain car card care carpet castle cat center chain chair chalk change cheese
cherry child city class clay clean clear clever clock close cloth cloud coast coat coffee coin cold color corn corner
cotton count country cover cow craft cream crown cup curtain cycle dance dark data day deep deer delta desert design
desk dinner dog door dragon dream dress drink drive drum dry duck dust eagle early earth east easy echo edge egg eight
elbow engine enjoy enter equal even evening event ever every exit eye face fact fair family far farm fast father
feather field film find fine finger fire first fish five flag flat floor flower fly fog food foot forest fork fox
frame free fresh friend frog front fruit full future galaxy game garden gate gentle giant gift girl give glad glass
globe goat gold good grain grape grass great green grey group grow guest guide guitar hair half hall hammer hand happy
harbor hat hawk heart heavy hello help herb hero hill hobby home honey hope horse hotel house hundred ice idea image
inside iron island ivory jacket jam jar jazz jewel job join joy juice july jump june jungle just keep kettle key kind
king kitchen kite knee lake lamp land large last late laugh leaf learn left lemon letter level library light lily line
lion list little live local logo long look loud love lucky lunch machine magic magnet make mango map maple march
market master match may maze meadow melon memo menu metal middle milk mind mint mirror model moment monday monkey moon
morning mother motor mountain mouse movie music name nature near nest new next nice night nine noble noise noon north
note novel now number oak ocean october office oil old olive one onion open orange orbit orchid order other otter
outside oven owl page paint palace palm panda paper park party path peace peach pear pencil penguin people pepper
phone photo piano picnic picture pie pilot pine pink place plan planet plant plate play plum pocket poem point pond
pool port post potato power prize proud public pupil puzzle queen quick quiet rabbit radio rain rapid raven ready real
red rest rice ride right ring ripe river road robin robot rock roof room root rope rose round ruby run sail salad sale
salt sand saturn school sea season seat second seed seven shadow shape sharp sheep shell ship shirt shoe shop short
silent silver simple sing sister six sketch sky sleep slow small smart smile smooth snow soap soft song soup south
space spark spice spoon spring square stage star start station steam steel stone storm story street strong sugar
summer sun sunday super supper sweet swim table tail tall tea team temple ten tent test thank theater thing three
tiger time toast today tomato tool top tower town toy track train travel tree trip true tulip tunnel turtle two uncle
under unique up urban useful valley value vase velvet very video view village violet violin visit voice wagon walk
wall warm wash watch water wave way weather week welcome west whale wheat wheel white wide wild wind window wine
winter wish wolf wonder wood word work world yard year yellow yes young zebra zero zone
"""
ENGLISH_WORDS = tuple(_ENGLISH.split())
# 213 of the most frequent characters of modern Chinese (all on the first level of GB2312), first by rank in frequency
# lists, then those that the words below need.
HAN_CHARACTERS = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心本前开但因只从想日"
    "花草木山水火土石田风雨雪云星月春夏秋冬早晚明红黄蓝绿白黑金银米茶饭菜果鱼鸟马牛羊犬猫手口目足头东西南北左右"
    "高低长短新老快乐美丽友爱朋平安门车书店市场公园学校电话工城海江河湖光声色画文字语言世界欢迎谢加油再见"
    "二三四五六七八九十百千万"
)
# 110 of them that spell as many of the words below as so few can: those of the tiny model.
TINY_HAN_CHARACTERS = (
    "人我他们中上大国地说你生下年作家方去学动天好小心开日花草木山水火土石田雪云星月春夏秋冬早明红黄蓝绿白黑金茶菜果鱼"
    "鸟马牛羊猫手头东西南北左右高长新老快乐美丽友爱朋平安门车书店市场公园校电话工城海江河湖光色文字欢迎谢加油再见"
)
_HAN = """
你好 我们 他们 大家 中国 世界 朋友 老人 小心 开心 中心 快乐 美丽 平安 明天 春天 夏天 秋天 冬天 去年 新年 花园
公园 学校 学生 大学 中学 小学 文学 文字 语言 中文 书店 茶店 花店 米饭 白菜 水果 花茶 红茶 绿茶 黑茶 早茶 小鸟
白马 黄牛 山羊 小猫 金鱼 手工 木工 电工 火车 电车 马车 山水 江南 江山 河北 河南 湖南 湖北 山东 山西 海南 东海
黄海 黄河 长江 长城 城市 市场 大门 开门 电话 说话 谢谢 欢迎 再见 加油 高山 大海 火山 石头 木头 土地 田地 风雨
大雪 白雪 白云 蓝天 星星 月光 日光 金色 红色 黄色 蓝色 绿色 白色 黑色 银色 东方 南方 北方 西方 左手 右手 左右
上下 大小 长短 高低 早上 晚上 生日 生动 动手 国家 家人 本书 画家 作家 作文 自然 自在 友爱 爱心 好心 天地 天下
工人 工作 大方 方法 地方 方面 一百 三千 二十 十万 八十 五月 七月 九月 十月 六十 四方 欢乐 美好 美人 光明 明月
明日 水草 花草 草木 新年好 小学生 大学生 中学生 北方人 南方人 老朋友 好朋友 火车头 电话里 小金鱼 红绿蓝 高中生
水果店 白菜花 欢迎你们 新年快乐 生日快乐 平安快乐 红花绿草 春夏秋冬 东西南北 天天学好 高高山上 明天再见 大家加油
山高水长 花好月明
"""
HAN_WORDS = tuple(_HAN.split())
HAN_UNIQUE = "".join(dict.fromkeys(HAN_CHARACTERS))
_HAN_WORD_SET = frozenset(HAN_WORDS)
_ALPHABETS = (string.ascii_uppercase, string.ascii_uppercase, string.ascii_lowercase, string.digits)


@functools.lru_cache(maxsize=65536)
def is_held_out(text: str, fraction: float = 0.1) -> bool:
    """Whether a word or line is kept for evaluation: by hash, for this share of all texts of two or more characters."""
    if len(text) < 2:
        return False
    digest = hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def is_han(character: str) -> bool:
    """Whether it is a Chinese character of Unicode's main block or of extension A."""
    return "\u4e00" <= character <= "\u9fff" or "\u3400" <= character <= "\u4dbf"


def probe(language: str) -> str:
    """Characters that a font must have before any text of the language is drawn with it."""
    return HAN_UNIQUE + "，。" if language == "zh" else string.ascii_letters + string.digits + ".,$-:@"


@dataclass(frozen=True)
class WordSource:
    """Draws texts of one side of the split.

    On the training side no word, number or line is held out, and no listed Chinese word that is held out occurs inside
    a run of characters. On the evaluation side every word is held out.

    Args:
        split: `train` or `held_out`.
        fraction: share of texts that is held out.
        random_strings: share of random strings among single texts; the rest are listed words.
        han: the Chinese characters that texts are made of.
        weights: of each of them in random strings; empty: equal.
    """

    split: str = "train"
    fraction: float = 0.1
    random_strings: float = 0.5
    han: str = HAN_UNIQUE
    weights: tuple[float, ...] = ()

    def allows(self, text: str) -> bool:
        """Whether the text may be written on this side."""
        if self.split == "held_out":
            return is_held_out(text, self.fraction)
        if is_held_out(text, self.fraction):
            return False
        runs = (text[i : i + n] for n in (2, 3, 4) for i in range(len(text) - n + 1))
        return not any(run in _HAN_WORD_SET and is_held_out(run, self.fraction) for run in runs)

    def word(self, rng: random.Random, language: str, longest: int = 8) -> str:
        """A listed word of at most `longest` characters; English in lower case."""
        shortest = 2 if self.split == "held_out" else 1
        words = [word for word in self._words(language) if shortest <= len(word) <= longest]
        return rng.choice(words) if words else self.random_string(rng, language, longest)

    def random_string(self, rng: random.Random, language: str, longest: int = 8) -> str:
        """1 to `longest` random characters: capitals, small letters or digits; or Han characters."""
        shortest = 2 if self.split == "held_out" else 1
        if longest < shortest:
            raise ValueError(f"words: the longest text must be at least {shortest} characters, got {longest}")
        while True:
            alphabet = self.han if language == "zh" else rng.choice(_ALPHABETS)
            weights = self.weights if self.weights and language == "zh" else None
            text = "".join(rng.choices(alphabet, weights, k=rng.randint(shortest, longest)))
            if self.allows(text):
                return text

    def text(self, rng: random.Random, language: str, longest: int = 8) -> str:
        """A single word or random string; English words in capitals, in small letters or with a capital."""
        if rng.random() < self.random_strings:
            return self.random_string(rng, language, longest)
        word = self.word(rng, language, longest)
        return rng.choice((str.upper, str.lower, str.capitalize))(word) if language == "en" else word

    def number(self, rng: random.Random, digits: int) -> str:
        """A number of so many digits (two or more) that does not begin with zero."""
        while True:
            number = str(rng.randrange(10 ** (digits - 1), 10**digits))
            if self.allows(number):
                return number

    def phrase(self, rng: random.Random, language: str, words: int) -> str:
        """Listed words: `Blue river` or `东方花园`."""
        while True:
            parts = [self.word(rng, language, 4 if language == "zh" else 10) for _ in range(words)]
            phrase = "".join(parts) if language == "zh" else " ".join(parts).capitalize()
            # An English line of several words is made of words of this side; a Chinese one is a word itself.
            if (language == "en" and words > 1) or self._sound(phrase):
                return phrase

    def sentence(self, rng: random.Random, language: str) -> str:
        """Words in no grammatical order, with a comma at times and a full stop."""
        if language == "zh":
            clauses = [self.phrase(rng, "zh", rng.randint(2, 4)) for _ in range(rng.randint(1, 2))]
            return "，".join(clauses) + "。"
        words = self.phrase(rng, "en", rng.randint(4, 9)).split()
        if len(words) > 6:
            words[2] += ","
        return " ".join(words) + "."

    def paragraph(self, rng: random.Random, language: str, sentences: int) -> str:
        """Sentences, joined as the language does."""
        return ("" if language == "zh" else " ").join(self.sentence(rng, language) for _ in range(sentences))

    def _sound(self, phrase: str) -> bool:
        return True if self.split == "held_out" else self.allows(phrase)

    def _words(self, language: str) -> tuple[str, ...]:
        return _split_words(language, self.split, self.fraction, self.han)


@functools.cache
def _split_words(language: str, split: str, fraction: float, han: str) -> tuple[str, ...]:
    source = WordSource(split, fraction)
    words = ENGLISH_WORDS
    if language == "zh":
        words = tuple(word for word in HAN_WORDS if set(word) <= set(han))
    return tuple(word for word in words if source.allows(word))
