//! Copies that are asked for wrongly, and what may be expected of them before they are waited for.

use std::sync::Arc;

use kernels::cuda::{Buffer, Download, Element, Gpu, Schedule, Uploader};
use kernels::{DType, Matrix, OpError};

fn gpu() -> Arc<Gpu> {
    Gpu::emulated(Schedule::Forward)
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn zeros(gpu: &Arc<Gpu>, len: usize) -> Buffer {
    gpu.upload(&vec![0f32; len]).expect("memory")
}

#[test]
fn an_upload_is_there_when_it_has_been_waited_for() {
    let gpu = gpu();
    let mut uploader = Uploader::new(&gpu, 4096, 2).expect("an uploader");
    let mut buffer = zeros(&gpu, 4);
    let bytes = bytes_of(&[1.0, 2.0, 3.0, 4.0]);
    let matrix = Matrix::new(&bytes, DType::F32, 2, 2).expect("a matrix");
    uploader.rows(buffer.all_mut(), 0, 2, matrix).expect("an upload");
    // Here the emulator is as late as a device may be.
    assert_eq!(buffer.read::<f32>().expect("read"), [0.0; 4]);
    uploader.finish().expect("all uploads");
    assert_eq!(buffer.read::<f32>().expect("read"), [1.0, 2.0, 3.0, 4.0]);
    // Nothing is under way, nothing is waited for.
    uploader.finish().expect("no uploads");
}

#[test]
fn an_uploader_and_the_buffers_it_writes_may_go_before_it_is_done() {
    let gpu = gpu();
    let bytes = bytes_of(&[1.0; 3000]);
    let matrix = Matrix::new(&bytes, DType::F32, 3, 1000).expect("a matrix");
    let mut kept = zeros(&gpu, 3000);
    let mut uploader = Uploader::new(&gpu, 4096, 2).expect("an uploader");
    uploader.rows(zeros(&gpu, 3000).all_mut(), 0, 1000, matrix).expect("an upload");
    uploader.rows(kept.all_mut(), 0, 1000, matrix).expect("an upload");
    drop(uploader);
    assert_eq!(kept.read::<f32>().expect("read"), [1.0; 3000]);
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let gpu = gpu();
    let mut uploader = Uploader::new(&gpu, 4096, 2).expect("an uploader");
    let bytes = bytes_of(&[1.0; 6]);
    let matrix = Matrix::new(&bytes, DType::F32, 2, 3).expect("a matrix");
    let mut buffer = zeros(&gpu, 8);
    uploader.rows(buffer.all_mut(), 1, 4, matrix).expect("exactly enough room");
    for (offset, stride) in [(2, 4), (0, 6), (0, 2), (usize::MAX, 3), (0, usize::MAX)] {
        let error = uploader.rows(buffer.all_mut(), offset, stride, matrix).expect_err("no room");
        assert!(matches!(error, OpError::Length { op: "upload", found: 8, .. }), "{error}");
    }
    let mut words = gpu.buffer(Element::U32, 8).expect("memory");
    let error = uploader.rows(words.all_mut(), 0, 3, matrix).expect_err("no floats");
    assert_eq!(error.to_string(), "upload: not for elements of type U32");
    let nothing = Matrix::new(&[], DType::F32, 0, 3).expect("no rows");
    uploader.rows(buffer.all_mut(), 8, 0, nothing).expect("nothing to do");
}

#[test]
fn a_download_is_of_its_type_and_has_room() {
    let gpu = gpu();
    let mut download = Download::<f32>::new(&gpu, 4).expect("a download");
    let error = download.start(zeros(&gpu, 5).all()).expect_err("no room");
    assert_eq!(error.to_string(), "download: from has 5 elements, 4 expected");
    let words = gpu.upload(&[1u32]).expect("memory");
    let error = download.start(words.all()).expect_err("no floats");
    assert_eq!(error.to_string(), "download: not for elements of type U32");
    assert_eq!(download.finish().expect("nothing"), []);
}

#[test]
fn copies_from_and_to_the_host_cannot_be_recorded() {
    let gpu = gpu();
    let mut uploader = Uploader::new(&gpu, 4096, 2).expect("an uploader");
    let mut download = Download::<f32>::new(&gpu, 4).expect("a download");
    let mut buffer = zeros(&gpu, 4);
    let bytes = bytes_of(&[1.0; 4]);
    let matrix = Matrix::new(&bytes, DType::F32, 2, 2).expect("a matrix");
    let error = gpu.capture(|| uploader.rows(buffer.all_mut(), 0, 2, matrix)).expect_err("no graph");
    assert_eq!(error.to_string(), "upload: not while a graph is captured");
    let error = gpu.capture(|| download.start(buffer.all())).expect_err("no graph");
    assert_eq!(error.to_string(), "download: not while a graph is captured");
}
