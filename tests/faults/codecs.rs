//! Faults in a codec of lines.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::{Buf, Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};
use tower::service_fn;
use tower_tcp::testkit::faults::{Faulty, Promise};
use tower_tcp::{ConnectionService, Pipeline};

use super::{Table, check_echo, echo};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Flaw {
    LosesBytesAtACut,
    HangsOnEmptyLines,
    TakesACutForALineEnd,
    HalfALineAtTheEnd,
    PanicsAtOneByte,
    FailsAtTheEnd,
    EndsNoEmptyLine,
    EndsALineWithTheNext,
    LosesBytesOfThreePieces,
    KeepsHalfALineForTheNext,
}

use Flaw::*;

struct Planted {
    flaw: Flaw,
    looks: usize,
    seen: usize,
    late: bool,
    shared: Arc<Mutex<BytesMut>>,
}

impl Decoder for Planted {
    type Item = Bytes;
    type Error = io::Error;

    fn decode(&mut self, buf: &mut BytesMut) -> io::Result<Option<Bytes>> {
        if self.flaw == KeepsHalfALineForTheNext {
            let mut shared = self.shared.lock().expect("no holder panics");
            shared.extend_from_slice(buf);
            buf.clear();
            let end = shared.iter().position(|byte| *byte == b'\n');
            return Ok(end.map(|end| {
                let line = shared.split_to(end).freeze();
                shared.advance(1);
                line
            }));
        }
        if self.flaw == PanicsAtOneByte && buf.len() == 1 && buf[0] != b'\n' {
            panic!("one byte");
        }
        if buf.len() > self.seen {
            self.looks += 1;
            self.seen = buf.len();
        }
        let Some(end) = buf.iter().position(|byte| *byte == b'\n') else {
            match self.flaw {
                LosesBytesAtACut => buf.clear(),
                TakesACutForALineEnd if !buf.is_empty() => return Ok(Some(buf.split().freeze())),
                _ => {}
            }
            return Ok(None);
        };
        if self.flaw == HangsOnEmptyLines && end == 0 {
            return Ok(None);
        }
        let mut line = buf.split_to(end).freeze();
        buf.advance(1);
        if self.flaw == LosesBytesOfThreePieces && self.looks == 3 && !line.is_empty() {
            line = line.slice(1..);
        }
        (self.looks, self.seen) = (0, 0);
        Ok(Some(line))
    }

    fn decode_eof(&mut self, buf: &mut BytesMut) -> io::Result<Option<Bytes>> {
        match self.decode(buf)? {
            Some(line) => Ok(Some(line)),
            None if self.flaw == FailsAtTheEnd => Err(io::ErrorKind::InvalidData.into()),
            None if self.flaw == HalfALineAtTheEnd && !buf.is_empty() => {
                Ok(Some(buf.split().freeze()))
            }
            None if buf.is_empty() => Ok(None),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Encoder<Bytes> for Planted {
    type Error = io::Error;

    fn encode(&mut self, line: Bytes, buf: &mut BytesMut) -> io::Result<()> {
        if std::mem::take(&mut self.late) {
            buf.extend_from_slice(b"\n");
        }
        buf.extend_from_slice(&line);
        match self.flaw {
            EndsNoEmptyLine if line.is_empty() => {}
            EndsALineWithTheNext => self.late = true,
            _ => buf.extend_from_slice(b"\n"),
        }
        Ok(())
    }
}

pub(crate) fn lines(flaw: Flaw) -> impl ConnectionService<Faulty> {
    let shared = Arc::default();
    let codec = move || Planted {
        flaw,
        looks: 0,
        seen: 0,
        late: false,
        shared: Arc::clone(&shared),
    };
    Pipeline::new(codec).service(service_fn(echo))
}

pub(crate) async fn find_all(table: &mut Table) {
    for (flaw, promise) in [
        (LosesBytesAtACut, Promise::Same),
        (HangsOnEmptyLines, Promise::Plain),
        (TakesACutForALineEnd, Promise::Same),
        (HalfALineAtTheEnd, Promise::Prefix),
        (PanicsAtOneByte, Promise::Same),
        (FailsAtTheEnd, Promise::Plain),
        (EndsNoEmptyLine, Promise::Plain),
        (EndsALineWithTheNext, Promise::Plain),
        (LosesBytesOfThreePieces, Promise::Same),
        (KeepsHalfALineForTheNext, Promise::Others),
    ] {
        let found = check_echo(move || lines(flaw)).await;
        table.found(&format!("codec: {flaw:?}"), promise, found);
    }
}
