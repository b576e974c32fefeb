//! Sends lines back by hand, with no library between the lines and the socket. No server that
//! separates lines can cost less, so the others are compared with this one.

mod accept;
mod by_hand;

use std::io;

#[tokio::main]
async fn main() -> io::Result<()> {
    accept::serve(by_hand::echo).await
}
