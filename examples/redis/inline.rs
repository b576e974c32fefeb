//! Inline requests, as people type them: the words of a line, which may be quoted.

use bytes::BytesMut;

use super::resp::{ProtocolError, Request, put_bulk};

/// Parses a line without its ending. The request may have no words.
pub(crate) fn parse(line: &[u8]) -> Result<Request, ProtocolError> {
    let mut bulks = BytesMut::with_capacity(line.len() + 16);
    let mut len = 0;
    let mut rest = line.trim_ascii_start();
    while !rest.is_empty() {
        rest = word(rest, &mut bulks)?.trim_ascii_start();
        len += 1;
    }
    Ok(Request::of_bulks(bulks.freeze(), len))
}

/// Takes a word from the front of a line, and appends it to `bulks`. Returns the rest of the line.
fn word<'a>(line: &'a [u8], bulks: &mut BytesMut) -> Result<&'a [u8], ProtocolError> {
    let plain = |byte: &u8| !byte.is_ascii_whitespace() && !matches!(byte, b'"' | b'\'');
    let end = line.iter().position(|byte| !plain(byte));
    let (plain, rest) = line.split_at(end.unwrap_or(line.len()));
    let Some((&quote @ (b'"' | b'\''), quoted)) = rest.split_first() else {
        put_bulk(bulks, plain);
        return Ok(rest);
    };
    let mut text = plain.to_vec();
    let rest = unquote(quote, quoted, &mut text)?;
    // As in Redis, a closing quote ends the word.
    if !rest.first().is_none_or(u8::is_ascii_whitespace) {
        return Err(ProtocolError::Quotes);
    }
    put_bulk(bulks, &text);
    Ok(rest)
}

/// Appends the text up to the closing quote to `text`, unescaped. Returns the rest of the line.
fn unquote<'a>(
    quote: u8,
    mut quoted: &'a [u8],
    text: &mut Vec<u8>,
) -> Result<&'a [u8], ProtocolError> {
    loop {
        quoted = match quoted {
            [] => return Err(ProtocolError::Quotes),
            [byte, rest @ ..] if *byte == quote => return Ok(rest),
            [b'\\', b'x', high, low, rest @ ..] if quote == b'"' && is_hex(*high, *low) => {
                text.push(16 * digit(*high) + digit(*low));
                rest
            }
            [b'\\', escaped, rest @ ..] if quote == b'"' => {
                text.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'a' => 0x07,
                    b'b' => 0x08,
                    other => *other,
                });
                rest
            }
            [b'\\', b'\'', rest @ ..] if quote == b'\'' => {
                text.push(b'\'');
                rest
            }
            [byte, rest @ ..] => {
                text.push(*byte);
                rest
            }
        };
    }
}

fn is_hex(high: u8, low: u8) -> bool {
    high.is_ascii_hexdigit() && low.is_ascii_hexdigit()
}

fn digit(hex: u8) -> u8 {
    match hex {
        b'0'..=b'9' => hex - b'0',
        _ => hex.to_ascii_lowercase() - b'a' + 10,
    }
}
