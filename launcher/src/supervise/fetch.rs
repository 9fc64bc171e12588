//! The downloads, one after the other, before anything else.

use std::time::Duration;

use tracing::info;

use super::deadline;
use crate::error::LaunchError;
use crate::plan::DownloadPlan;
use crate::process::Process;
use crate::signals::StopSignals;

/// A download has nothing to put in order, so it ends at once; this is the time for a machine that is very busy.
const DOWNLOAD_END: Duration = Duration::from_secs(10);

/// Waits until the files of a repository are there; false when a signal has ended that. What has come by then stays in
/// the cache, and the next download goes on from it.
pub(super) async fn fetch(download: &DownloadPlan, signals: &mut StopSignals) -> Result<bool, LaunchError> {
    let DownloadPlan { id, command } = download;
    info!("Starting check and download process for {id}");
    let mut process = Process::spawn("download", command).map_err(LaunchError::DownloadCannotStart)?;
    let ending = tokio::select! {
        biased;
        signal = signals.next() => {
            info!("{signal}: stopping");
            process.terminate();
            process.end_by(deadline(DOWNLOAD_END)).await;
            return Ok(false);
        }
        ending = process.end() => ending,
    };
    if !ending.is_success() {
        return Err(LaunchError::DownloadFailed { id: id.clone(), ending });
    }
    info!("Successfully downloaded weights for {id}");
    Ok(true)
}
