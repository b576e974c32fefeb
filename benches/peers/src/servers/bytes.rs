//! Lines back by hand, with no library between them and the socket. Nothing that tells lines apart costs less, which is why the
//! others are compared to it.

mod accept;
mod by_hand;

use std::io;

#[tokio::main]
async fn main() -> io::Result<()> {
    accept::serve(by_hand::echo).await
}
