// Pictures of the camera, as PNG files.

import { get } from "./dom.js";

let stream = null;

export function closeCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  get("camera").hidden = true;
}

export async function openCamera() {
  if (!navigator.mediaDevices) throw new Error("The browser gives a page no camera at this address. Open it under localhost.");
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 640 } });
  } catch {
    throw new Error("There is no camera, or the browser does not allow this page to use it.");
  }
  get("video").srcObject = stream;
  get("camera").hidden = false;
  get("camera-take").focus();
}

export async function takePicture() {
  const video = get("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  closeCamera();
  const time = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
  return [blob, `camera-${time}.png`];
}
