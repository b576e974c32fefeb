//! The codec, with two modes: lines of commands, and the text of a mail.
//!
//! The encoder sets the decoder's mode: once it has written the answer 354, the input is the text
//! of a mail, up to its end. So the mode changes between two frames, and pipelined input is decoded
//! in the right mode.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use memchr::memchr;
use tokio_util::codec::{Decoder, Encoder};

use super::answer::{Answer, GO_AHEAD};
use super::command::Command;

/// The maximum length of a command in octets, including its ending: 512 (RFC 5321, section
/// 4.5.3.1.4), plus the parameters of SIZE (26) and 8BITMIME (17).
pub(crate) const MAX_COMMAND: usize = 512 + 26 + 17;

/// The maximum length of a line of text in octets, including its ending but not the dot that is
/// added for transparency (RFC 5321, section 4.5.3.1.6).
pub(crate) const MAX_TEXT_LINE: usize = 1_000;

/// The maximum size of a piece of text in one frame, in bytes. It is well below a pipeline's limit
/// for frames.
const PIECE: usize = 16 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// A command, or the answer to a line that is not a command.
    Command(Result<Command, Answer>),
    /// A piece of a mail's text, without the dots that are added for transparency.
    Text(Bytes),
    /// The end of a mail, with the flaw for which it is rejected, if there is one.
    EndOfText(Result<(), Flaw>),
}

/// A reason to reject a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// A CR without LF, or an LF without CR. The next server may take it for the end of a line, and
    /// together with a dot for the end of the mail. That server would then run the rest of the text
    /// as commands (SMTP smuggling, CVE-2023-51764).
    BareLineBreak,
    LongLine,
}

/// The codec of one connection.
#[derive(Debug)]
pub(crate) struct Smtp {
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    /// Holds the number of bytes at the front of the buffer that contain no LF, so that no byte is
    /// searched twice.
    Commands(usize),
    /// A command was too long; the rest of it is skipped.
    Skipping,
    Text(Text),
}

impl Default for Smtp {
    fn default() -> Self {
        Self {
            mode: Mode::Commands(0),
        }
    }
}

impl Decoder for Smtp {
    type Item = Input;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<Input>> {
        match &mut self.mode {
            Mode::Commands(searched) => {
                let end = src.len().min(MAX_COMMAND);
                if let Some(found) = memchr(b'\n', &src[*searched..end]) {
                    let line = src.split_to(*searched + found + 1);
                    self.mode = Mode::Commands(0);
                    return Ok(Some(Input::Command(command(&line))));
                }
                *searched = end;
                if end == MAX_COMMAND {
                    self.mode = Mode::Skipping;
                    return self.decode(src);
                }
                Ok(None)
            }
            Mode::Skipping => {
                let Some(found) = memchr(b'\n', src) else {
                    src.clear();
                    return Ok(None);
                };
                src.advance(found + 1);
                self.mode = Mode::Commands(0);
                let answer = Answer::new(500, "Line too long");
                Ok(Some(Input::Command(Err(answer))))
            }
            Mode::Text(text) => {
                let input = text.decode(src);
                if matches!(input, Some(Input::EndOfText(_))) {
                    self.mode = Mode::Commands(0);
                }
                Ok(input)
            }
        }
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> io::Result<Option<Input>> {
        let input = self.decode(src)?;
        // An incomplete command is still in the buffer. In the other modes the buffer is empty.
        if input.is_none() && !matches!(self.mode, Mode::Commands(_)) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the stream ended within a long line or a mail",
            ));
        }
        Ok(input)
    }
}

/// Parses a line. A bare LF is not a valid ending, but it is answered, because the client would
/// otherwise wait forever.
fn command(line: &[u8]) -> Result<Command, Answer> {
    match line.strip_suffix(b"\r\n") {
        Some(line) => Command::parse(line),
        None => Err(Answer::new(500, "A line ends with CRLF")),
    }
}

impl Encoder<Answer> for Smtp {
    type Error = io::Error;

    fn encode(&mut self, answer: Answer, dst: &mut BytesMut) -> io::Result<()> {
        let last = answer.lines.len().saturating_sub(1);
        for (n, line) in answer.lines.iter().enumerate() {
            let between = if n < last { '-' } else { ' ' };
            dst.put_slice(format!("{}{between}{line}\r\n", answer.code).as_bytes());
        }
        if answer.code == GO_AHEAD {
            self.mode = Mode::Text(Text::default());
        }
        Ok(())
    }
}

/// The decoder of the text of a mail.
#[derive(Debug, Default)]
struct Text {
    at: At,
    /// The length of the line so far.
    column: usize,
    flaw: Option<Flaw>,
}

/// The position after the last byte read. A dot at the start of a line, and a CR after it, are held
/// back, because they may belong to the end of the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    LineStart,
    Dot,
    DotCr,
    Inside,
    Cr,
    End,
}

impl Text {
    fn decode(&mut self, src: &mut BytesMut) -> Option<Input> {
        if self.at != At::End {
            if src.is_empty() {
                return None;
            }
            let most = src.len().min(PIECE);
            let mut text = BytesMut::with_capacity(most);
            let mut read = 0;
            while read < most && self.at != At::End {
                self.take(src[read], &mut text);
                read += 1;
            }
            src.advance(read);
            if self.at != At::End || !text.is_empty() {
                return Some(Input::Text(text.freeze()));
            }
        }
        Some(Input::EndOfText(self.flaw.map_or(Ok(()), Err)))
    }

    fn take(&mut self, byte: u8, text: &mut BytesMut) {
        self.at = match (self.at, byte) {
            (At::LineStart, b'.') => {
                self.at = At::Dot;
                return;
            }
            (At::Dot, b'\r') => {
                self.at = At::DotCr;
                return;
            }
            (At::DotCr, b'\n') => {
                self.at = At::End;
                return;
            }
            (At::Cr, b'\n') => At::LineStart,
            (At::Cr | At::DotCr, _) | (_, b'\n') => {
                self.flaw.get_or_insert(Flaw::BareLineBreak);
                if byte == b'\r' { At::Cr } else { At::Inside }
            }
            (_, b'\r') => At::Cr,
            _ => At::Inside,
        };
        text.put_u8(byte);
        self.column += 1;
        if self.column > MAX_TEXT_LINE {
            self.flaw.get_or_insert(Flaw::LongLine);
        }
        if self.at == At::LineStart {
            self.column = 0;
        }
    }
}
