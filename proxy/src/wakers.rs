//! Tasks that a change concerns: registered without a lock or an allocation of their own, woken all at once.

use std::{
    cell::RefCell,
    rc::Rc,
    task::{Context, Waker},
};

/// Those of one worker that wait for one kind of change.
#[derive(Clone, Default)]
pub(crate) struct Wakers(Rc<Places>);

#[derive(Default)]
struct Places {
    wakers: RefCell<Vec<Option<Waker>>>,
    free: RefCell<Vec<usize>>,
}

/// One task's place among them, taken when it first waits.
pub(crate) struct Place {
    of: Wakers,
    index: Option<usize>,
}

impl Wakers {
    /// A place to wait in.
    pub(crate) fn place(&self) -> Place {
        Place { of: self.clone(), index: None }
    }

    /// Wakes all who wait.
    pub(crate) fn wake(&self) {
        for waker in self.0.wakers.borrow().iter().flatten() {
            waker.wake_by_ref();
        }
    }
}

impl Place {
    /// The task that polls with `cx` is woken by the next change, and by those after it.
    pub(crate) fn wait(&mut self, cx: &Context<'_>) {
        let places = &self.of.0;
        let mut wakers = places.wakers.borrow_mut();
        match self.index {
            Some(index) => match &mut wakers[index] {
                Some(waker) if waker.will_wake(cx.waker()) => {}
                waker => *waker = Some(cx.waker().clone()),
            },
            None => {
                let waker = Some(cx.waker().clone());
                self.index = Some(match places.free.borrow_mut().pop() {
                    Some(index) => {
                        wakers[index] = waker;
                        index
                    }
                    None => {
                        wakers.push(waker);
                        wakers.len() - 1
                    }
                });
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(index) = self.index {
            self.of.0.wakers.borrow_mut()[index] = None;
            self.of.0.free.borrow_mut().push(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_once_and_used_again() {
        let wakers = Wakers::default();
        let cx = Context::from_waker(Waker::noop());
        let (mut a, mut b) = (wakers.place(), wakers.place());
        for _ in 0..3 {
            a.wait(&cx);
            b.wait(&cx);
        }
        drop(a);
        let mut c = wakers.place();
        c.wait(&cx);
        wakers.wake();
        assert_eq!(wakers.0.wakers.borrow().len(), 2);
        drop((b, c));
        assert_eq!(wakers.0.free.borrow().len(), 2);
    }
}
