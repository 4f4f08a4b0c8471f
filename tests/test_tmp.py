import time
def test_it(toys, run_cli, tmp_path, monkeypatch):
    for args in (["stage=pretrain","data=own"], ["stage=finetune"], ["stage=finetune","stage.max_steps=20","data.workers=2","stage.pack_length=160"]):
        t=time.time(); c=time.process_time()
        done = run_cli(*toys.arguments(*args, runs=tmp_path))
        monkeypatch.delenv("VLM_TUNE_RUN_FOLDER")
        print(done.out[-300:]); print(done.code, time.time()-t, time.process_time()-c)
