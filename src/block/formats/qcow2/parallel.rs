//! Parts of one operation at the same time, a bounded number of them.

use futures_util::{StreamExt, stream};

use crate::driver::BoxFuture;
use crate::error::Result;

/// How many parts of one request run at once.
const PARALLEL: usize = 16;

/// Runs all parts to their ends, whatever happens to some: nothing of a failed operation lands later. The first error.
pub(super) async fn run_all(parts: Vec<BoxFuture<'_, Result<()>>>) -> Result<()> {
    let mut parts = stream::iter(parts).buffer_unordered(PARALLEL);
    let mut result = Ok(());
    while let Some(done) = parts.next().await {
        result = result.and(done);
    }
    result
}

/// Runs parts that can be given up, and answers what they answer, in order.
pub(super) async fn collect<T: Send>(parts: Vec<BoxFuture<'_, Result<T>>>) -> Result<Vec<T>> {
    let mut answers = Vec::with_capacity(parts.len());
    let mut parts = stream::iter(parts).buffered(PARALLEL);
    while let Some(answer) = parts.next().await {
        answers.push(answer?);
    }
    Ok(answers)
}
