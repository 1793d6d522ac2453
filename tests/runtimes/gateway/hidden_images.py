"""Ways to hide an image in a text, for tests: how it is written, and what it is wrapped in."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable

from hypothesis import strategies as st
from PIL import Image

from tests.runtimes.gateway.servers import SAFE, data_url

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'


def encoded(kind: str, picture: Image.Image = SAFE.resize((24, 24))) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


FILES = {
    kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "AVIF", "JPEG2000", "PDF")
}
FILES |= {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(40)),
    "JXL": b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl " + bytes(range(40)),
    "J2K": b"\xff\x4f\xff\x51\0\x2f\0\0" + bytes(range(40)),
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + bytes(range(40)),
    "big-endian TIFF": b"MM\0*\0\0\0\x08" + bytes(range(40)),
}
"""Files of the formats that servers read."""

OF_PILLOW = {
    kind: encoded(kind, SAFE.resize((24, 24)).convert(mode))
    for kind, mode in {"BLP": "P", "MSP": "1", "XBM": "1"}.items()
} | {kind: encoded(kind) for kind in ("DIB", "EPS", "ICNS", "MPO", "PCX", "PPM", "QOI", "SGI", "TGA")}
"""Of further formats that Pillow reads: the shorter beginnings count in a data URL only."""
Way = Callable[[str], str]
WRITTEN: dict[str, Way] = {
    "plain": lambda url: url,
    "upper case": lambda url: re.sub("^[^,]*,", lambda head: head[0].upper(), url),
    "decimal entities": lambda url: "".join(f"&#{ord(sign)};" for sign in url),
    "entities without semicolons": lambda url: "".join(f"&#{ord(sign):07}" for sign in url),
    "hexadecimal entities": lambda url: "".join(f"&#x{ord(sign):X};" for sign in url),
    "named entities": lambda url: url.replace(":", "&colon;").replace("/", "&sol;").replace(",", "&comma;"),
    "some entities": lambda url: url.replace("a", "&#97;").replace("m", "&#x6d"),
    "entities twice": lambda url: url.replace(":", "&amp;colon;").replace("d", "&amp;#100;"),
    "entities three times": lambda url: url.replace("d", "&amp;amp;#100;"),
    "percent signs": lambda url: "".join(f"%{each:02x}" for each in url.encode()),
    "percent signs twice": lambda url: url.replace("t", "%2574").replace(":", "%253A"),
    "percent signs and u": lambda url: url.replace("d", "%u0064"),
    "white space": lambda url: " \n".join(url[:40]) + url[40:],
    "line breaks": lambda url: "\r\n".join(url[at : at + 19] for at in range(0, len(url), 19)),
    "tabs": lambda url: "\t".join(url[:90]) + url[90:],
    "zero-width characters": lambda url: "\u200b".join(url[:30]) + url[30:],
    "soft hyphens": lambda url: "\xad".join(url),
    "control characters": lambda url: "\x00\x1b".join(url[:50]) + url[50:],
    "bidi marks": lambda url: "\u202e" + "\u2066".join(url[:50]) + url[50:],
    "tags": lambda url: "\U000e0041".join(url[:50]) + url[50:],
    "zero-width percent signs": lambda url: "%E2%80%8B".join(url[:12]) + url[12:],
    "zero-width entities": lambda url: "&ZeroWidthSpace;".join(url[:12]) + url[12:],
    "JSON escapes": lambda url: re.sub("....", lambda unit: f"\\u{unit[0]}", url.encode("utf-16-be").hex()),
    "JavaScript escapes": lambda url: "".join(f"\\x{ord(sign):02x}" for sign in url),
    "braced escapes": lambda url: "".join(f"\\u{{{ord(sign):x}}}" for sign in url),
    "octal escapes": lambda url: "".join(f"\\{ord(sign):03o}" for sign in url),
    "CSS escapes": lambda url: "".join(f"\\{ord(sign):06x}" for sign in url),
    "short CSS escapes": lambda url: "".join(f"\\{ord(sign):x} " for sign in url),
    "escaped slashes": lambda url: url.replace("/", "\\/"),
    "escapes of escapes": lambda url: url.replace("d", "\\\\\\\\u0064"),
    "letters that mean themselves": lambda url: "\\" + url,
    "punctuation": lambda url: url.replace(":", "\\:").replace(",", "\\,"),
    "full-width letters": lambda url: url.replace("data:", "ｄａｔａ："),
    "styled letters": lambda url: url.replace("data", "𝐝𝐚𝐭𝐚"),
}
"""Each takes a data URL or another text and returns another spelling of it."""

WRAPPED: dict[str, Way] = {
    "alone": lambda url: url,
    "in words": lambda url: f"Please look at {url} and say what it is.",
    "Markdown": lambda url: f"![]({url})",
    "Markdown with words": lambda url: f'![a picture](<{url}> "title")',
    "Markdown reference": lambda url: f"![a][b]\n\n[b]: {url}",
    "Markdown short reference": lambda url: f"![Some  b]\n\n> [some b]: <{url}>",
    "img": lambda url: f'<img alt="a" src="{url}">',
    "img without quotes": lambda url: f"<IMG SRC={url} >",
    "img on several lines": lambda url: f"<img\n  alt='>'\n  src = '{url}'/>",
    "picture": lambda url: f'<picture><source srcset="a.png 1x, {url} 2x"></picture>',
    "srcset": lambda url: f'<img src=a.png srcset="{url} 2x">',
    "SVG image": lambda url: f'<svg><image xlink:href="{url}"/></svg>',
    "input": lambda url: f'<input type="image" src="{url}">',
    "video": lambda url: f'<video poster="{url}"></video>',
    "object": lambda url: f'<object data="{url}"></object>',
    "style": lambda url: f'<div style="background: url({url})">',
    "style sheet": lambda url: f'a {{ content: url( "{url}" ) }}',
    "image set": lambda url: f'a {{ background: image-set("{url}" 1x) }}',
    "link in an image's words": lambda url: f"![a [b](c) d]({url})",
    "image in a link": lambda url: f"[![a]({url})](page)",
    "BBCode": lambda url: f"[IMG width=3]{url}[/IMG]".lower().replace(url.lower(), url),
    "reStructuredText": lambda url: f".. image:: {url}",
    "AsciiDoc": lambda url: f"image::{url}[a]",
    "embedded in a note": lambda url: f"![[{url}]]",
    "a wiki's": lambda url: f"[[File:{url}|thumb]]",
    "base": lambda url: f'<base href="{url}"><img src="a.png">',
    "JSON": lambda url: f'{{"image": "{url}"}}',
    "img with many words": lambda url: f'<img alt="{"word " * 600}" src="{url}">',
    "img with quotes that pair otherwise": lambda url: f'<img a=x" b=">" src="{url}">',
    "srcset of many": lambda url: f'<img srcset="{"a.png 1x, " * 300}{url} 2x">',
    "Markdown reference with many words": lambda url: f"![{'word ' * 300}][b]\n\n[b]: {url}",
}
"""Each puts a URL into a text."""


def url_kinds() -> dict[str, str]:
    """Return data URLs that say different things of themselves."""
    kinds = {kind: data_url(content, "image/" + kind.lower().split()[-1]) for kind, content in FILES.items()}
    packed = base64.b64encode(FILES["PNG"]).decode()
    svg = base64.b64encode(SVG).decode()
    return kinds | {
        "no type": f"data:;base64,{packed}",
        "another type": f"data:application/octet-stream;base64,{packed}",
        "text": f"data:text/plain;charset=utf-8;base64,{packed}",
        "parameters": f"data:image/png;name=a.png;charset=x;base64,{packed}",
        "no padding": f"data:image/png;base64,{packed.rstrip('=')}",
        "URL-safe": f"data:image/jpeg;base64,{base64.urlsafe_b64encode(FILES['JPEG']).decode()}",
        "slashes": f"data://image/png;base64,{packed}",
        "SVG": f"data:image/svg+xml;base64,{svg}",
        "SVG as another type": f"data:text/xml;base64,{svg}",
        "raw SVG": f"data:image/svg+xml;utf8,{SVG.decode()}",
        "raw SVG in percent signs": "data:image/svg+xml," + "".join(f"%{each:02X}" for each in SVG),
        "raw bytes": "data:image/png," + "".join(f"%{each:02X}" for each in FILES["PNG"]),
        "in a page": "data:text/html;base64,"
        + base64.b64encode(f'<img src="data:image/png;base64,{packed}">'.encode()).decode(),
        "an unknown format": f"data:image/x-own;base64,{base64.b64encode(bytes(60)).decode()}",
    }


URLS = url_kinds()


def packed_kinds() -> dict[str, str]:
    """Return images that are no data URLs but decode to a file."""
    packed = {f"{kind} in base64": base64.b64encode(content).decode() for kind, content in FILES.items()}
    packed |= {f"{kind} in hexadecimal": content.hex() for kind, content in FILES.items()}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "HEIC", "JPEG2000", "PSD"):
        packed[f"{kind} in base85"] = base64.b85encode(FILES[kind]).decode()
        packed[f"{kind} in Ascii85"] = base64.a85encode(FILES[kind], adobe=True).decode()
    return packed | {
        "a hexadecimal dump": FILES["PNG"].hex(" ").upper(),
        "an array of C": ", ".join(f"0x{each:02X}" for each in FILES["JPEG"]),
        "a string of C": "".join(f"\\x{each:02x}" for each in FILES["GIF"]),
        "base64 in lines": base64.encodebytes(FILES["WEBP"]).decode(),
        "base64 in a URL": base64.urlsafe_b64encode(FILES["JPEG"]).decode(),
        "a data URL": base64.b64encode(data_url(FILES["PNG"]).encode()).decode(),
        "PPM": base64.b64encode(encoded("PPM")).decode(),
        "PGM": base64.b64encode(b"P5\n# words\n64 64\n255\n" + bytes(64)).decode(),
        "SVG": base64.b64encode(SVG).decode(),
    }


PACKED = packed_kinds()
ADDRESSES = {
    "https": "https://evil.example/a.png",
    "http": "http://10.0.0.1/a",
    "upper case": "HTTPS://EVIL.EXAMPLE/A.PNG",
    "no scheme": "//evil.example/a.png",
    "backslashes": "https:\\\\evil.example\\a.png",
    "file": "file:///etc/a.png",
    "ftp": "ftp://evil.example/a.png",
    "blob": "blob:https://evil.example/1234",
    "host in brackets": "http://[::1]/a.png",
}
SHOWING = [name for name in WRAPPED if name not in ("alone", "in words", "JSON")]
"""Wrappings that show what an address leads to."""

PLACEHOLDERS = [
    *("<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<start_of_image>"),
    *("<end_of_image>", "<image_soft_token>", "<__media__>", "<__media_x7Ab3__>", "[IMG]", "[IMG_END]", "<|image|>"),
    *(
        "<|image_1|>",
        "<image_placeholder>",
        "<IMG_CONTEXT>",
        "<im_patch>",
        "<|media_pad|>",
        "<fake_token_around_image>",
    ),
    *(
        "<|begin_of_image|>",
        "<|START_OF_IMG|>",
        "<img></img>",
        "(<image>./</image>)",
        "[img-0]",
        "<img>/data/a.png</img>",
        "<img>https://evil.example/a.png</img>",
        "<|endoftext10|>",
        "<|image>",
        "<image|>",
        "<|image token|>",
        "<|visual token 000123|>",
        "<｜hy_place▁holder▁no▁102｜>",
        "<|imgpad|>",
        "<|patch|>",
    ),
]

HARMLESS = [
    "What does ![alt](url) do in markdown?",
    'How do I write <img src="cat.png">?',
    "explain data:image/png;base64,",
    "Is `data:image/png;base64,...` a URL? And data:image/png;base64,… or data:image/jpeg;base64,<payload>?",
    'url = f"data:image/jpeg;base64,{encoded}"  # is this right?',
    '<img src="data:image/png;base64,YOUR_BASE64_HERE"> does not show. Why?',
    "What is the difference between data:image/png;base64, and data:image/svg+xml; in browsers of the nineties?",
    "Why does base64 of a PNG always begin with iVBORw0KGgo and that of a JPEG with /9j/ in every file?",
    "A PNG begins with 89 50 4E 47 0D 0A 1A 0A, a JPEG with FF D8 FF. Is that so?",
    "Read https://docs.example/guide and [the manual](https://docs.example) please.",
    "![logo](img/logo.png) in a README next to [a link](https://docs.example) and [1]: https://a.example",
    "How do <picture> and <source srcset='a.png 1x, b.png 2x'> differ from <img>?",
    '<a href="https://docs.example">docs</a> <script src="https://cdn.example/a.js"></script>',
    "@font-face { src: url(https://fonts.example/a.woff2) } body { background: url(bg.png) }",
    "What does <|im_start|> mean in ChatML, and <start_of_turn> in Gemma?",
    "SVG has <svg><image href='a.png'></image></svg>; old pages had <IMG> and <IMAGE>. [IMAGE] stands in drafts.",
    "<|im_user|>hello<|im_end|> and <|eot_id|>",
    "In F#, `x |> f` and `f <| x` are the same; in Haskell a <|> b is another thing.",
    "metadata: the data: field holds a list, an image/png type, and more.",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855, is it empty?",
    "-----BEGIN CERTIFICATE-----\nMIIBszCCARwCCQDYr9yDHlDLLzANBgkqhkiG9w0BAQsFADAeMRww\n-----END",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIn0.SflKxwRJSMeKKF2QT4",
    "data:text/plain;base64,SGVsbG8sIFdvcmxkISBUaGlzIGlzIHBsYWluIHRleHQu",
    "data:text/html,<h1>hello</h1>",
    "100% of 5 &lt; 6 &amp;&amp; C:\\data\\new\\image.png",
    'printf("%d%%\\n", x); const re = /\\d+\\.\\w/; // regular',
    "数据：图像是什么？ ما هي الصورة؟ 👩‍👩‍👧‍👦",
    'Summarise: <video> and <audio> are HTML elements; so is <input type="text">.',
    "The tags <h1>, <p>, <br/> and &copy; 2024; use &#169; too.",
    "x" * 5000,
    "",
]


def obfuscated() -> st.SearchStrategy[str]:
    """Return texts with an image in up to three spellings over each other and words around."""
    words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="&%\\"), max_size=12)
    safe_over = [
        "decimal entities",
        "hexadecimal entities",
        "percent signs",
        "JSON escapes",
        "braced escapes",
        "soft hyphens",
    ]
    return st.builds(
        lambda url, way, over, wrap, before, after: (
            f"{before} {WRAPPED[wrap](WRITTEN[over](WRITTEN[way](url)))} {after}"
        ),
        st.sampled_from(sorted(URLS)).map(lambda kind: URLS[kind]),
        st.sampled_from([way for way in WRITTEN if way not in ("letters that mean themselves",)]),
        st.sampled_from(["plain", *safe_over]),
        st.sampled_from(sorted(WRAPPED)),
        words,
        words,
    )
