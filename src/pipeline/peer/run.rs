use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The maximum number of frames in a run. A run is one entry of a queue, so this number bounds the
/// memory of a queue.
const MOST: usize = 64;

/// Appends the second frame to the first. Returns `false`, and leaves the first frame as it is, if
/// the two cannot be merged.
pub(crate) type Merge<T> = fn(&mut T, &T) -> bool;

/// A run: frames that were broadcast, one after the other, to the same connections. These
/// connections share the run, which is one entry in the queue of each. A later broadcast adds its
/// frame only to the run, not to each queue. The run is closed when one of the connections takes
/// it, gets another entry after it, reaches the high mark of its output, or begins to close.
pub(crate) struct Run<T> {
    frames: Mutex<Frames<T>>,
    /// Clones a frame. This is a function pointer, because the queue also exists for types of
    /// frames that are not `Clone` and are never broadcast.
    clone: fn(&T) -> T,
    merge: Option<Merge<T>>,
}

struct Frames<T> {
    list: Vec<T>,
    /// The number of frames that were added, including those that were merged into others.
    added: usize,
    is_open: bool,
}

impl<T> Run<T> {
    pub(crate) fn new(frame: T, merge: Option<Merge<T>>) -> Self
    where
        T: Clone,
    {
        Self {
            frames: Mutex::new(Frames {
                list: vec![frame],
                added: 1,
                is_open: true,
            }),
            clone: T::clone,
            merge,
        }
    }

    /// Adds a frame. Returns `false` if the run is closed or full.
    pub(crate) fn add(&self, frame: &T) -> bool {
        let mut frames = self.lock();
        if !frames.is_open || frames.added == MOST {
            return false;
        }
        frames.added += 1;
        if let Some(merge) = self.merge
            && let Some(last) = frames.list.last_mut()
            && merge(last, frame)
        {
            return true;
        }
        frames.list.push((self.clone)(frame));
        true
    }

    /// Closes the run, so that no more frames can be added.
    pub(super) fn close(&self) {
        self.lock().is_open = false;
    }

    pub(super) fn len(&self) -> usize {
        self.lock().list.len()
    }

    /// Returns the frames of a closed run. They are moved if no other connection has the run, and
    /// cloned otherwise.
    pub(super) fn take(self: Arc<Self>) -> Vec<T> {
        match Arc::try_unwrap(self) {
            Ok(run) => {
                let frames = run.frames.into_inner();
                frames.unwrap_or_else(PoisonError::into_inner).list
            }
            Err(run) => run.lock().list.iter().map(run.clone).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Frames<T>> {
        // If cloning or merging a frame panics, the list is still intact.
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
