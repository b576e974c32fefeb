//! Decodes input that arrives in pieces.

use bytes::BytesMut;
use tokio_util::codec::Decoder;

/// Feeds the input in pieces of the given sizes, of which the last repeats. Returns the items up to
/// the end or the error.
pub(crate) fn decode<D: Decoder>(
    mut codec: D,
    input: &[u8],
    sizes: &[usize],
) -> (Vec<D::Item>, Option<D::Error>) {
    let mut items = Vec::new();
    let mut buffer = BytesMut::new();
    let mut rest = input;
    let last = *sizes.last().expect("a size is given");
    let mut sizes = sizes.iter().copied().chain(std::iter::repeat(last));
    while !rest.is_empty() {
        let size = sizes.next().expect("the last one repeats");
        let (piece, later) = rest.split_at(size.clamp(1, rest.len()));
        buffer.extend_from_slice(piece);
        rest = later;
        loop {
            match codec.decode(&mut buffer) {
                Ok(Some(item)) => items.push(item),
                Ok(None) => break,
                Err(err) => return (items, Some(err)),
            }
        }
    }
    loop {
        // An empty chunk for ever would never end.
        assert!(items.len() <= input.len(), "more items than bytes");
        match codec.decode_eof(&mut buffer) {
            Ok(Some(item)) => items.push(item),
            Ok(None) => return (items, None),
            Err(err) => return (items, Some(err)),
        }
    }
}
