"""The closed world of the built-in data: 48 things and 8 background colours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """One kind of object. `codepoint` is the lower-case hexadecimal emoji name; `zh` and `measure`
    form "一只猫"."""

    codepoint: str
    name: str
    plural: str
    zh: str
    measure: str


@dataclass(frozen=True)
class Colour:
    """One background colour; `rgb` is its centre in 0..255, every scene jitters it a little."""

    name: str
    zh: str
    rgb: tuple[int, int, int]


THINGS: tuple[Thing, ...] = (
    Thing("1f436", "dog", "dogs", "狗", "只"),
    Thing("1f431", "cat", "cats", "猫", "只"),
    Thing("1f437", "pig", "pigs", "猪", "只"),
    Thing("1f981", "lion", "lions", "狮子", "只"),
    Thing("1f43c", "panda", "pandas", "熊猫", "只"),
    Thing("1f98a", "fox", "foxes", "狐狸", "只"),
    Thing("1f438", "frog", "frogs", "青蛙", "只"),
    Thing("1f430", "rabbit", "rabbits", "兔子", "只"),
    Thing("1f418", "elephant", "elephants", "大象", "只"),
    Thing("1f422", "turtle", "turtles", "乌龟", "只"),
    Thing("1f433", "whale", "whales", "鲸鱼", "只"),
    Thing("1f419", "octopus", "octopuses", "章鱼", "只"),
    Thing("1f980", "crab", "crabs", "螃蟹", "只"),
    Thing("1f427", "penguin", "penguins", "企鹅", "只"),
    Thing("1f98b", "butterfly", "butterflies", "蝴蝶", "只"),
    Thing("1f41d", "bee", "bees", "蜜蜂", "只"),
    Thing("1f34e", "apple", "apples", "苹果", "个"),
    Thing("1f34c", "banana", "bananas", "香蕉", "个"),
    Thing("1f353", "strawberry", "strawberries", "草莓", "个"),
    Thing("1f3a9", "hat", "hats", "帽子", "顶"),
    Thing("1f955", "carrot", "carrots", "胡萝卜", "个"),
    Thing("1f349", "watermelon", "watermelons", "西瓜", "个"),
    Thing("1f354", "burger", "burgers", "汉堡", "个"),
    Thing("1f916", "robot", "robots", "机器人", "个"),
    Thing("1f369", "donut", "donuts", "甜甜圈", "个"),
    Thing("1f697", "car", "cars", "汽车", "辆"),
    Thing("1f68c", "bus", "buses", "巴士", "辆"),
    Thing("1f680", "rocket", "rockets", "火箭", "个"),
    Thing("1f6b2", "bicycle", "bicycles", "自行车", "辆"),
    Thing("26f5", "boat", "boats", "帆船", "艘"),
    Thing("1f69c", "tractor", "tractors", "拖拉机", "辆"),
    Thing("1f333", "tree", "trees", "树", "棵"),
    Thing("1f335", "cactus", "cactuses", "仙人掌", "棵"),
    Thing("1f344", "mushroom", "mushrooms", "蘑菇", "个"),
    Thing("1f339", "rose", "roses", "玫瑰", "朵"),
    Thing("1f33b", "sunflower", "sunflowers", "向日葵", "朵"),
    Thing("1f511", "key", "keys", "钥匙", "把"),
    Thing("1f381", "gift", "gifts", "礼物", "个"),
    Thing("23f0", "clock", "clocks", "闹钟", "个"),
    Thing("1f3b8", "guitar", "guitars", "吉他", "把"),
    Thing("1f941", "drum", "drums", "鼓", "个"),
    Thing("2602", "umbrella", "umbrellas", "雨伞", "把"),
    Thing("1f388", "balloon", "balloons", "气球", "个"),
    Thing("1f451", "crown", "crowns", "皇冠", "个"),
    Thing("1f4f7", "camera", "cameras", "相机", "个"),
    Thing("2600", "sun", "suns", "太阳", "个"),
    Thing("1f308", "rainbow", "rainbows", "彩虹", "道"),
    Thing("1f3e0", "house", "houses", "房子", "座"),
)

COLOURS: tuple[Colour, ...] = (
    Colour("red", "红色", (246, 138, 130)),
    Colour("orange", "橙色", (255, 200, 126)),
    Colour("yellow", "黄色", (252, 242, 140)),
    Colour("green", "绿色", (152, 222, 152)),
    Colour("blue", "蓝色", (136, 176, 250)),
    Colour("purple", "紫色", (206, 164, 242)),
    Colour("white", "白色", (244, 244, 244)),
    Colour("cyan", "青色", (140, 228, 226)),
)
