//! The services of a connection. They do what their requests say.

use std::convert::Infallible;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Sleep, sleep};
use tower::{Service, service_fn};
use tower_tcp::close::Linger;
use tower_tcp::pipeline::{Crossing, Event, Upgrade};
use tower_tcp::{BoxError, Connection, Reply};

use super::program::program;
use super::record::{Call, Conn, Leg, Message, Running, Then};
use super::wire::{Kind, Out, Request, Tag};
use super::{Peer, STEP};

/// The service of a pipeline.
pub(crate) struct Worker {
    pub(crate) peer: Peer,
    pub(crate) conn: Arc<Conn>,
    pub(crate) leg: usize,
    pub(crate) unready: Option<Pin<Box<Sleep>>>,
}

/// A reply of a pipeline, with or without upgrades.
pub(crate) struct Answer {
    pub(crate) reply: Reply<Out>,
    pub(crate) then: Then,
}

impl From<Answer> for Reply<Out> {
    fn from(Answer { reply, then }: Answer) -> Self {
        assert_ne!(then, Then::Upgrade);
        reply
    }
}

impl From<Answer> for Upgrade<Out> {
    fn from(Answer { reply, then }: Answer) -> Self {
        if then == Then::Upgrade {
            reply.upgrade()
        } else {
            reply.into()
        }
    }
}

impl Service<Event<Request, Message>> for Worker {
    type Response = Answer;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.unready.is_none() && self.conn.log().random.one_in(16) {
            self.unready = Some(Box::pin(sleep(STEP)));
            self.conn.log().legs[self.leg].asked = true;
        }
        if let Some(unready) = &mut self.unready {
            ready!(unready.as_mut().poll(cx));
            self.unready = None;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, event: Event<Request, Message>) -> Self::Future {
        let (request, message) = match event {
            Event::Request(request) => (Some(request), None),
            Event::Message(message) => (None, Some(message.deliver())),
        };
        let call = self.conn.begin(self.leg, request.as_ref());
        let running = Running {
            conn: Arc::clone(&self.conn),
            leg: self.leg,
        };
        let work = Work {
            peer: self.peer.clone(),
            running,
            call,
        };
        Box::pin(async move {
            match (request, message) {
                (Some(Request::Command(command)), _) => work.command(&command).await,
                (_, Some((_, block))) if block > 0 => Ok(work.change_mode(block)),
                (_, Some((n, _))) if n.is_multiple_of(3) => Ok(work.finish(1, Then::GoOn)),
                (_, Some(_)) => Ok(work.finish(0, Then::GoOn)),
                _ => Ok(work.finish(1, Then::GoOn)),
            }
        })
    }
}

/// One call.
pub(crate) struct Work {
    pub(crate) peer: Peer,
    pub(crate) running: Running,
    pub(crate) call: usize,
}

impl Work {
    pub(crate) async fn command(self, command: &str) -> Result<Answer, BoxError> {
        let mut words = command.split(' ');
        let what = words.next().unwrap();
        let delay: u32 = words.next().unwrap().parse().unwrap();
        let n: usize = words.next().unwrap().parse().unwrap();
        if delay > 0 {
            sleep(STEP * delay).await;
        }
        let Running { conn, leg } = &self.running;
        match what {
            "one" => Ok(self.finish(1, Then::GoOn)),
            "none" => Ok(self.finish(0, Then::GoOn)),
            "several" => Ok(self.finish(n, Then::GoOn)),
            "stream" => {
                let delay = STEP * (delay % 3);
                let tags = self.settle(n, Then::GoOn);
                Ok(self.streamed(tags, delay, false))
            }
            "break" => {
                let tags = self.settle(n, Then::Fail);
                Ok(self.streamed(tags, Duration::ZERO, true))
            }
            "close" => Ok(self.finish(n, Then::Close)),
            "fail" => {
                self.settle(0, Then::Fail);
                Err("it fails".into())
            }
            "pend" => pending().await,
            "pause" => {
                self.peer.pause_input();
                conn.log().legs[*leg].paused = true;
                let (peer, resumed, leg) = (self.peer.clone(), Arc::clone(conn), *leg);
                conn.spawn(async move {
                    sleep(STEP * u32::try_from(n).unwrap()).await;
                    resume(&peer, &resumed, leg);
                });
                Ok(self.finish(1, Then::GoOn))
            }
            "push" => {
                for _ in 0..n {
                    try_push(&self.peer, conn, *leg, 0);
                }
                Ok(self.finish(1, Then::GoOn))
            }
            "mode" => Ok(self.change_mode(n)),
            "later" => {
                let mut message = Message::new(conn, *leg, 0, self.call, None);
                message.block = n;
                let Err(refused) = self.peer.try_post(message) else {
                    return Ok(self.finish(0, Then::GoOn));
                };
                refused.into_inner().settle();
                Ok(self.change_mode(n))
            }
            "upgrade" => Ok(self.finish(1, Then::Upgrade)),
            other => panic!("{other:?} was never sent"),
        }
    }

    /// Records the end of the call, with this many frames. Returns their tags.
    pub(crate) fn settle(&self, frames: usize, then: Then) -> Vec<Tag> {
        let kind = match then {
            Then::Upgrade => Kind::LastReply,
            _ => Kind::Reply,
        };
        let tags: Vec<_> = (0..frames)
            .map(|n| Tag {
                kind,
                of: self.call,
                n,
            })
            .collect();
        let leg = &mut self.running.conn.log().legs[self.running.leg];
        leg.finished.push(self.call);
        leg.calls[self.call] = Call {
            tags: tags.clone(),
            then: Some(then),
        };
        tags
    }

    pub(crate) fn finish(&self, frames: usize, then: Then) -> Answer {
        let Running { conn, leg } = &self.running;
        let mut outs: Vec<_> = self
            .settle(frames, then)
            .into_iter()
            .map(|tag| conn.out(*leg, tag))
            .collect();
        let mut reply = match outs.len() {
            0 => Reply::none(),
            1 => outs.remove(0).into(),
            _ => outs.into(),
        };
        if then == Then::Close {
            reply = reply.close();
        }
        Answer { reply, then }
    }

    /// Answers with a frame after which `block` bytes are the next request.
    pub(crate) fn change_mode(&self, block: usize) -> Answer {
        let Running { conn, leg } = &self.running;
        let mut out = conn.out(*leg, self.settle(1, Then::GoOn).remove(0));
        out.block = block;
        Answer {
            reply: out.into(),
            then: Then::GoOn,
        }
    }

    pub(crate) fn streamed(&self, tags: Vec<Tag>, delay: Duration, breaks: bool) -> Answer {
        let Running { conn, leg } = &self.running;
        let broken = breaks.then(|| Err("it breaks".into()));
        let frames: Vec<_> = tags
            .into_iter()
            .map(|tag| Ok(conn.out(*leg, tag)))
            .chain(broken)
            .collect();
        let frames = stream::unfold(frames.into_iter(), move |mut frames| async move {
            if !delay.is_zero() {
                sleep(delay).await;
            }
            Some((frames.next()?, frames))
        });
        Answer {
            reply: Reply::stream(frames),
            then: Then::GoOn,
        }
    }
}

pub(crate) fn resume(peer: &Peer, conn: &Conn, leg: usize) {
    conn.log().legs[leg].paused = false;
    peer.resume_input();
}

/// Pushes the next frame of a task. Returns whether it was accepted.
pub(crate) fn try_push(peer: &Peer, conn: &Arc<Conn>, leg: usize, of: usize) -> bool {
    let out = next_push(conn, leg, of);
    // Without the lock, because a refused frame is dropped here.
    let taken = peer.try_send(out).is_ok();
    if taken {
        conn.log().legs[leg].pushed.entry(of).or_default().taken += 1;
    }
    taken
}

pub(crate) fn next_push(conn: &Arc<Conn>, leg: usize, of: usize) -> Out {
    let n = conn.log().legs[leg].pushed.entry(of).or_default().taken;
    let kind = Kind::Push;
    conn.out(leg, Tag { kind, of, n })
}

pub(crate) fn make(
    leg: usize,
) -> impl Service<
    Peer,
    Response = Worker,
    Error = Infallible,
    Future = impl Future<Output = Result<Worker, Infallible>> + Send,
> + Clone
+ Send
+ 'static {
    service_fn(move |peer: Peer| async move {
        let conn = Conn::of(&peer);
        {
            let mut log = conn.log();
            assert_eq!(log.legs.len(), leg, "each is made once");
            log.legs.push(Leg::new(conn.case.marks));
        }
        let told = Arc::clone(&conn);
        let mut crossings = peer.crossings();
        conn.spawn(async move {
            let mut last = Crossing::Low;
            while let Some(crossing) = crossings.next().await {
                assert_ne!(crossing, last, "they take turns");
                last = crossing;
                told.log().legs[leg].told += 1;
            }
        });
        for of in 1..3 {
            let random = conn.log().random.fork();
            let task = program(peer.clone(), Arc::clone(&conn), leg, of, random);
            conn.spawn(task);
        }
        Ok(Worker {
            peer,
            conn,
            leg,
            unready: None,
        })
    })
}

/// Sends bytes back until a drain.
pub(crate) async fn raw<Io>(mut conn: Connection<Io>) -> Result<(), BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let shared = Arc::clone(conn.info().get::<Arc<Conn>>().unwrap());
    let mut draining = std::pin::pin!(conn.draining());
    let mut buf = [0; 64];
    loop {
        let read = tokio::select! {
            biased;
            read = conn.read(&mut buf) => read?,
            () = &mut draining => break,
        };
        if read == 0 {
            break;
        }
        shared.log().read_raw.extend(&buf[..read]);
        conn.write_all(&buf[..read]).await?;
    }
    conn.close(Linger::default()).await?;
    Ok(())
}
