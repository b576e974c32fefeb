//! Vectors that are bent in a few places: bytes are inserted, replaced or cut off.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::vectors;

/// Generates bent vectors, with up to 19 random bytes behind them.
pub(crate) fn almost_a_header() -> impl Strategy<Value = Vec<u8>> {
    let vectors: Vec<_> = vectors::all()
        .into_iter()
        .map(|vector| vector.bytes)
        .collect();
    let short: Vec<_> = vectors
        .into_iter()
        .filter(|bytes| bytes.len() < 1000)
        .collect();
    let often = || prop::sample::select(&b"\r\n 0159:.+-PXTCUN46\0\x01\x03\x11\x20\x21"[..]);
    let byte = prop_oneof![any::<u8>(), often()];
    let bend = (0..3_u8, any::<Index>(), byte);
    let behind = vec(any::<u8>(), 0..20);
    (prop::sample::select(short), vec(bend, 0..4), behind).prop_map(|(mut bytes, bends, behind)| {
        for (how, at, byte) in bends {
            let at = at.index(bytes.len() + 1);
            match how {
                0 => bytes.insert(at, byte),
                1 if at < bytes.len() => bytes[at] = byte,
                _ => bytes.truncate(at),
            }
        }
        bytes.extend(behind);
        bytes
    })
}
