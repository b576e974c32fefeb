//! An answer of the server: a code, and one or more lines.

use std::borrow::Cow;

/// The code of the answer after which the client sends its mail (RFC 5321, section 4.3.2).
pub(crate) const GO_AHEAD: u16 = 354;

/// A reply in the sense of RFC 5321, section 4.2.
///
/// Its lines contain no line breaks, because a command that contains one is refused before any part
/// of it is repeated in an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) lines: Vec<Cow<'static, str>>,
}

impl Answer {
    pub(crate) fn new(code: u16, line: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            lines: vec![line.into()],
        }
    }

    pub(crate) fn line(mut self, line: impl Into<Cow<'static, str>>) -> Self {
        self.lines.push(line.into());
        self
    }
}
