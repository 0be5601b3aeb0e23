package worker

// GatherAlways has the worker put frames into bundles however few they are. It is called
// before Run.
func (w *Worker) GatherAlways() { w.bundles.frames, w.bundles.runs = 0, 0 }
