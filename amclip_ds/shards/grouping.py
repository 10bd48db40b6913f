"""What a sample is: neighbours in a tar with one key, and which of them is its image, its caption, its label.

Index, check, training and evaluation all ask here. The key is a member's name up to the first dot of its base name
(webdataset's rule), the rest is its suffix. The image is the member whose suffix is that of an image, `jpg`; without
one, the first whose last suffix is, `input.jpg`. So for texts (`txt`), json and labels (`cls`). Further images of the
key are surplus: no sample has them, but the account names them.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from amclip_ds.shards.tar import Damage, Link, Member, split_name

IMAGE_TYPES = {"jpg": 1, "jpeg": 1, "png": 2, "webp": 3}
"""suffix -> its number in an index"""
MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 1 << 28, 1 << 20  # of a member; none larger is read
ADVICE = {
    "surplus image": "a key ends at the first dot of a name, and has one image: write scan_0001.jpg, not scan.0001.jpg",
    "not adjacent": "members of a sample are not adjacent: pack with tar --sort=name",
    "sparse": "stored without its holes: pack without tar --sparse",
    "unread type": "JPEG, PNG and WebP are read: `amclip data pack` reads no others either; convert them",
    "link": "links have no content: pack with tar --dereference --hard-dereference",
    "surplus caption": "one text is read of a sample: write its captions into one .txt, a line each",
    "duplicate": "an image with several captions is one sample: write them into one .txt, a line each",
    "not utf-8": "texts are UTF-8, or have a byte-order mark: convert them",
    "hidden image": "a name that begins with a dot belongs to no sample: rename it",
    "zeros": "other readers stop there: pack again, or join with tar --concatenate",
}
"""What to do about a problem, by its kind."""


@dataclass
class Group:
    """Consecutive members with the same key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """by suffix, in the tar's order"""
    at_damage: bool = False
    """a neighbour of damage: what is missing here is lost, not left out"""

    def images(self) -> list[tuple[str, Member]]:
        """(its type, member) of every image: the sample's own first, then the surplus."""
        return self.of_types(*IMAGE_TYPES)

    def member(self, kind: str) -> Member | None:
        """The member of a type (txt, json, cls), if there is one."""
        found = self.of_types(kind)
        return found[0][1] if found else None

    def unreadable(self) -> str:
        """Why its members are not read, whatever they hold ("" if they are): `too large` or `sparse`.

        A sparse file can claim terabytes: none larger than any honest one is read.
        """
        texts = [member for member in (self.member("txt"), self.member("json")) if member]
        images = [image for _, image in self.images()[:1]]
        if any(member.is_sparse for member in (*images, *texts)):
            return "sparse"
        is_large = any(m.size > MAX_IMAGE_BYTES for m in images) or any(m.size > MAX_TEXT_BYTES for m in texts)
        return "too large" if is_large else ""

    def of_types(self, *kinds: str) -> list[tuple[str, Member]]:
        """(type, member) of these types: exact suffixes first, in the tar's order otherwise."""
        found = [(s, m) for s, m in self.members.items() if s.rpartition(".")[2] in kinds]
        found.sort(key=lambda of: of[0] not in kinds)
        return [(suffix.rpartition(".")[2], member) for suffix, member in found]


def group(found: Iterable[Member | Link | Damage]) -> Iterator[Group | Link | Member | Damage]:
    """The groups of a tar, in order, each followed by the damage that was met in or behind it. Between them come links
    and members that can belong to no sample, as they are: hidden files."""
    current: Group | None = None
    same_as = ""
    damages: list[Damage] = []
    for item in found:
        if isinstance(item, Damage):
            damages.append(item)
            if current:
                current.at_damage = True
            continue
        key, suffix = split_name(item.name)
        if isinstance(item, Link) or not key:
            yield item
            continue
        whole = key if key.isascii() else unicodedata.normalize("NFC", key)  # macOS writes names decomposed
        if current is None or whole != same_as or suffix in current.members:
            if current:
                yield current
            yield from damages
            current, same_as = Group(key, at_damage=bool(damages)), whole
            damages = []
        current.members[suffix] = item
    if current:
        yield current
    yield from damages


def scattered(groups: Iterable[Group]) -> set[str]:
    """The keys whose image is in one group and whose other members in another."""
    with_image: set[str] = set()
    without: set[str] = set()
    for one in groups:
        (with_image if one.images() else without).add(one.key)
    return with_image & without


def left_out_name(item: Link | Member) -> str:
    """The kind of problem that a link or a hidden file is: `link`, `hidden image`, or "" for what is no image."""
    base = item.name.rpartition("/")[2].lower()
    if base.rpartition(".")[2] not in IMAGE_TYPES or base.startswith("._"):  # `._`: macOS keeps attributes there
        return ""
    return "link" if isinstance(item, Link) else "hidden image"
