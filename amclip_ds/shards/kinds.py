"""What a file is that is no tar, by its name or its first bytes, in words that say what to do."""

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
MADE_BY = "`amclip data pack` makes them of folders, tables and Hugging Face data sets"
PACK = f"training reads tars of key.jpg beside key.txt, its caption; {MADE_BY}"
UNPACK = "samples are read by offset, which a compressed file has not; unpack it first: "
TABLE = f"a table, not shards; {PACK} (img2dataset --output_format=webdataset makes them from a table of URLs)"
ARROW = f"a file of a Hugging Face data set; {PACK}"
NAMES = {  # how a name ends -> what it is, and what to do
    ".tar.gz": f"a compressed tar: {UNPACK}gunzip",
    ".tgz": f"a compressed tar: {UNPACK}gunzip",
    ".tar.zst": f"a compressed tar: {UNPACK}zstd -d",
    ".tzst": f"a compressed tar: {UNPACK}zstd -d",
    ".tar.xz": f"a compressed tar: {UNPACK}unxz",
    ".txz": f"a compressed tar: {UNPACK}unxz",
    ".tar.bz2": f"a compressed tar: {UNPACK}bunzip2",
    ".tbz2": f"a compressed tar: {UNPACK}bunzip2",
    ".tar.lz4": f"a compressed tar: {UNPACK}lz4 -d",
    ".zip": f"a zip archive; {PACK}",
    ".7z": f"a 7z archive; {PACK}",
    ".rar": f"a rar archive; {PACK}",
    ".csv": TABLE,
    ".tsv": TABLE,
    ".parquet": TABLE,
    ".jsonl": TABLE,
    ".ndjson": TABLE,
    ".xlsx": TABLE,
    ".json": f"a json file; {PACK}",
    ".arrow": ARROW,
    ".tfrecord": f"a file of TFRecords; {PACK}",
    ".h5": f"an HDF5 file; {PACK}",
    ".hdf5": f"an HDF5 file; {PACK}",
    ".npz": f"a file of NumPy arrays; {PACK}",
    ".npy": f"a file of NumPy arrays; {PACK}",
    ".mdb": f"an LMDB database; {PACK}",
    ".beton": f"a file of FFCV; {PACK}",
    ".mds": f"a shard of MosaicML streaming; {PACK}",
    **{f".{image}": f"one image; {PACK}" for image in IMAGES},
}
HEADS = (  # how a file begins -> what it is
    (b"\x1f\x8b", NAMES[".tar.gz"]),
    (b"\x28\xb5\x2f\xfd", NAMES[".tar.zst"]),
    (b"\xfd7zXZ\0", NAMES[".tar.xz"]),
    (b"BZh", NAMES[".tar.bz2"]),
    (b"\x04\x22\x4d\x18", NAMES[".tar.lz4"]),
    (b"PK\x03\x04", NAMES[".zip"]),
    (b"7z\xbc\xaf\x27\x1c", NAMES[".7z"]),
    (b"Rar!", NAMES[".rar"]),
    (b"PAR1", TABLE),
    (b"ARROW1", ARROW),
    (b"\x89HDF\r\n", NAMES[".h5"]),
    (b"\x93NUMPY", NAMES[".npy"]),
    (b"\xff\xd8\xff", NAMES[".jpg"]),
    (b"\x89PNG\r\n", NAMES[".png"]),
    (b"GIF8", NAMES[".gif"]),
    (b"%PDF", f"a PDF; {PACK}"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: git lfs pull fetches it"),
    (b"<!DOCTYPE", "a web page: a download has failed, or wanted a login"),
    (b"<!doctype", "a web page: a download has failed, or wanted a login"),
    (b"<html", "a web page: a download has failed, or wanted a login"),
    (b"<?xml", "an XML text: a download has failed, or wanted a login"),
)
COMPRESSED = tuple(ending for ending, what in NAMES.items() if what.startswith("a compressed tar"))
HEAD = 64


def kind_by_name(path: str) -> str:
    """What a file of this name is, if it is certainly no tar; else empty."""
    name = path.lower()
    return next((what for ending, what in NAMES.items() if name.endswith(ending)), "")


def kind_of(head: bytes) -> str:
    """What a file that begins so is, if it is certainly no tar: 'a compressed tar: ...'; else empty."""
    return next((what for start, what in HEADS if head.startswith(start)), "")
