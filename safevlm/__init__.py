"""What a Safe-VLM checkpoint is: opening one, its family, its guard head and tap, its preprocessing.

Light half, safe on a device (numpy, Pillow and pydantic only): ``errors``, ``commandline``, ``image``,
``preprocessing``, ``manifest``. Everything else may load torch or transformers.
"""
