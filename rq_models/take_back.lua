-- Cancel the jobs that are still queued.
--
-- KEYS  for each job the queue list, and the list of what was handed from its front, see take.lua
-- ARGV  1 RQ's key prefix, 2 seconds to keep what is cancelled, then the id of each job
-- Returns for each job whether it was queued still.
--
-- RQ never clears rq:canceled, and callers may give up often: so these are not listed there, and expire.
local call, answers = redis.call, {}
for n = 1, #KEYS / 2 do
  local id = ARGV[2 + n]
  local job = ARGV[1] .. ':job:' .. id
  answers[n] = call('LREM', KEYS[2 * n - 1], 1, id)
  if answers[n] == 0 then
    -- A worker may have been cut off before its take.
    local handed = redis.pcall('LREM', KEYS[2 * n], 1, id)
    answers[n] = type(handed) == 'number' and handed or 0
  end
  if answers[n] > 0 and call('EXISTS', job) == 1 then
    call('HSET', job, 'status', 'canceled')
    call('EXPIRE', job, ARGV[2])
  end
end
return answers
