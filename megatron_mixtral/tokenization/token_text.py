"""One token on its own: the text, or the bytes, that it stands for."""

from megatron_mixtral.tokenization.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token on its own, as logprobs name it: a lone byte reads `bytes:\\xe2`, as the OpenAI API writes it."""
    text = _text_or_byte(tokenizer, token)
    if isinstance(text, str):
        return text or f"<{token}>"
    return chr(text) if text < 0x80 else f"bytes:\\x{text:02x}"


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int]:
    """The UTF-8 bytes of one token."""
    text = _text_or_byte(tokenizer, token)
    return [text] if isinstance(text, int) else list(text.encode())


def _text_or_byte(tokenizer: Tokenizer, token: int) -> str | int:
    """What a token stands for: text, one byte where its piece reads `<0xE2>`, nothing where it has no piece."""
    piece = tokenizer.piece(token) if token < tokenizer.vocab_size else ""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return int(piece[3:5], 16)
    return piece.replace("\u2581", " ")
